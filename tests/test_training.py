"""The drawn world, the oracle that reads it, and the rule that keeps captions from training."""

import random

from training.evaluate import ASPECTS, Case, accuracy, choose_cases
from training.oracle import read_picture
from training.scenes import (
    all_grammar_captions,
    draw_scene,
    grammar_caption,
    is_held_out,
    random_scene,
    scene_from_caption,
)


def test_oracle_reads_drawn_scenes_and_notices_wrong_ones():
    rng = random.Random(7)
    scenes = rng.sample(all_grammar_captions(), 150)
    cases = [Case(grammar_caption(*scene), *scene, seed=0) for scene in scenes]
    pictures = [draw_scene(scene_from_caption(*scene, rng), 128) for scene in scenes]
    assert accuracy(cases, pictures)["all four"] >= 99

    for case, picture in zip(cases[:40], pictures[:40], strict=True):
        reading = read_picture(picture)
        for other in cases[:40]:
            expected = {aspect: getattr(case, aspect) == getattr(other, aspect) for aspect in ASPECTS}
            assert other.rights(reading) == expected


def test_held_out_captions_are_never_drawn_for_training():
    rng = random.Random(0)
    scenes = [random_scene(rng) for _ in range(5000)]
    spelled = {caption for scene in scenes for caption in scene.grammar_captions}
    held_out = {grammar_caption(*scene) for scene in all_grammar_captions() if is_held_out(grammar_caption(*scene))}
    assert len(held_out) >= 120 and not spelled & held_out
    assert len(spelled) > 500

    halves = choose_cases(120)
    assert {case.caption for case in halves["never trained on"]} <= held_out
    assert not {case.caption for case in halves["trained on"]} & held_out
    assert all(len(cases) == 120 for cases in halves.values())
