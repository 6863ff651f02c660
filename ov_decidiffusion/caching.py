"""Feature caching: on most steps, run only the top level of the U-Net.

What the deeper levels compute changes slowly from step to step, so it can be kept for a few steps while the top
level goes on (DeepCache: Ma et al. 2023, arXiv 2312.00858). In U-Net-NAS the top level has no attention and is about
a fifth of the work. Both models come out of one converted graph by cutting it where the way up reaches the top
level, so whatever the graph's weights and formats are, they are the shallow model's too.
"""

import math
import re

import openvino as ov
from openvino import opset13 as ops

DEEP_FEATURES = "deep_features"


def deep_features(model: ov.Model) -> ov.Output:
    """The tensor [b, channels, h, w] that the deeper levels hand to the top level, at the latents' own size.

    Raises:
        ValueError: the model is no U-Net whose blocks can be told apart.
    """
    joined = {}
    for node in model.get_ordered_ops():
        found = re.search(r"\bup_blocks\.(\d+)/aten::cat/Concat$", node.get_friendly_name())
        if found and node.get_type_name() == "Concat":
            joined[int(found.group(1))] = node
    if not joined:
        raise ValueError("Feature caching needs a U-Net that convert_checkpoint wrote; this one has no up blocks.")
    return joined[max(joined)].input_value(0)


def expose_deep_features(model: ov.Model) -> ov.Model:
    """Give a U-Net a second output, ``deep_features``; the first stays what it is. Returns the same model."""
    result = ops.result(deep_features(model))
    model.add_results([result])
    result.output(0).get_tensor().add_names({DEEP_FEATURES})
    model.validate_nodes_and_infer_types()
    return model


def cut_shallow_model(model: ov.Model) -> ov.Model:
    """The top level alone: takes ``sample``, ``timestep`` and ``deep_features`` and gives ``out_sample``.

    The text only acts in deeper levels, so it is no input any more. ``model`` is used up.

    Raises:
        ValueError: as ``deep_features``, or the top level looks at the text.
    """
    cut = deep_features(model)
    channels = cut.get_partial_shape()[1]
    given = ops.parameter(ov.PartialShape([-1, channels, -1, -1]), cut.get_element_type(), DEEP_FEATURES)
    given.output(0).get_tensor().set_names({DEEP_FEATURES})
    for consumer in cut.get_target_inputs():
        consumer.replace_source_output(given.output(0))
    wanted = [port.get_node() for port in model.inputs if port.any_name in ("sample", "timestep")]
    try:
        return ov.Model([model.output("out_sample").get_node()], [*wanted, given], "unet_top_level")
    except RuntimeError as error:
        raise ValueError("Feature caching needs a U-Net without attention at its top level.") from error


def full_steps(total: int, interval: int, power: float = 1.0) -> list[bool]:
    """Which of ``total`` steps run the whole U-Net: the first, the last, and as many between as are needed.

    The last does because what a run ends on shows: one that ends on reused features is worse than a shorter one that
    does not. Of n whole steps after the first, number j = 1, 2, … comes at (total - 1) * (j / n) ** power: evenly and
    at most ``interval`` apart for a power of 1, as many but closer together at the start for a larger one (the
    paper's "non-uniform" schedule is a power law as well).
    """
    last = total - 1
    count = math.ceil(last / interval)
    whole = [0]
    for j in range(1, count + 1):
        position = math.floor(last * (j / count) ** power + 0.5)
        whole.append(max(position, whole[-1] + 1))
    there = set(whole)
    return [index in there for index in range(total)]
