"""The interactive demo: a Gradio page over the pipeline."""
