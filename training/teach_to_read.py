"""Pretrain the text encoder on captions, before the denoiser uses it.

An untrained text encoder says little about the object: its word is one of 77 tokens, and a denoiser's attention, which
is spread evenly at first, sees a 77th of it. (After 300,000 pictures of joint training from scratch, the places
followed the captions, but the objects did not at all.) So the encoder first learns, from captions alone, to encode the
scene's content in the mean of its hidden states. That takes two minutes, and no pictures.
"""

import random

import torch
from torch import nn
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

from training.artwork import HUES, ICONS
from training.scenes import PLACES, SIZES, Scene, random_scene, reword

QUESTIONS = {  # questions about a caption, and the possible answers; None: the caption does not say
    "first object": [None, *ICONS],
    "second object": [None, *ICONS],
    "first colour": [None, *HUES],
    "second colour": [None, *HUES],
    "place": [None, *PLACES],
    "size": [None, *SIZES],
}


def answers(scene: Scene, caption: str) -> list[int]:
    """For each question, the index of the answer that a scene's caption gives."""
    said = [item for item in scene.objects if item.name in caption]
    first, second = (said[i] if i < len(said) else None for i in (0, 1))
    colours = [
        None if one is None or one.color is None or one.color not in caption else one.color for one in (first, second)
    ]
    place = scene.place if scene.place in caption else None
    size = "pair" if second else scene.size if scene.size in ("small", "large") and scene.size in caption else None
    given = [first and first.name, second and second.name, *colours, place, size]
    return [choices.index(one) for choices, one in zip(QUESTIONS.values(), given, strict=True)]


def teach_to_read(
    encoder: CLIPTextModel, tokenizer: CLIPTokenizer, steps: int, batch: int = 128, rate: float = 1e-3, seed: int = 0
) -> float:
    """Train a text encoder in place, on captions of training scenes.

    Returns:
        the percentage of right answers at the end.
    """
    width = encoder.config.hidden_size
    head = nn.ModuleList(nn.Linear(width, len(choices)) for choices in QUESTIONS.values())
    optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], lr=rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    rng, right = random.Random(seed), 0.0
    progress = tqdm(range(steps), desc="learning to read", unit="step")
    for _ in progress:
        scenes = [random_scene(rng) for _ in range(batch)]
        captions = [reword(scene, rng) for scene in scenes]
        wanted = torch.tensor([answers(scene, caption) for scene, caption in zip(scenes, captions, strict=True)])
        ids = tokenizer(captions, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
        pooled = encoder(ids).last_hidden_state.mean(dim=1)
        said = [layer(pooled) for layer in head]
        loss = sum(nn.functional.cross_entropy(one, wanted[:, i]) for i, one in enumerate(said))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        hits = torch.stack([one.argmax(dim=1) == wanted[:, i] for i, one in enumerate(said)]).float().mean().item()
        right = hits if right == 0 else 0.95 * right + 0.05 * hits
        progress.set_postfix(right=f"{100 * right:.1f} %")
    return 100 * right
