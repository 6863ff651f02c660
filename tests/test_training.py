"""The drawn world, the oracle that reads it, and the rule that keeps captions from training."""

import random

import torch
from torch import nn

from training import little_scenes
from training.artwork import ICONS
from training.common import fingerprint, optimizer_step, resume, save_state, step_generator
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
from training.train_denoiser import draw_timesteps


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


def test_training_goes_on_where_it_stopped_and_only_where_it_is_the_same(tmp_path):
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    key = [fingerprint(model.parameters()), 100]
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer_step(optimizer, model(torch.ones(4, 3)).square().sum(), rate=0.1)
    save_state(tmp_path / "state.pt", key, 7, model=model, optimizer=optimizer)

    other = nn.Linear(3, 2)
    fresh = {name: value.clone() for name, value in other.state_dict().items()}
    assert resume(tmp_path / "state.pt", [key[0], 200], model=other) == 0
    assert resume(tmp_path / "state.pt", [fingerprint(other.parameters()), 100], model=other) == 0
    assert resume(tmp_path / "nothing.pt", key, model=other) == 0
    assert all(torch.equal(value, fresh[name]) for name, value in other.state_dict().items())
    assert resume(tmp_path / "state.pt", key, model=other, optimizer=torch.optim.AdamW(other.parameters())) == 7
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in other.state_dict().items())


def test_timesteps_cover_the_schedule_and_dwell_where_captions_decide():
    drawn = torch.cat([draw_timesteps(48, 1000, step_generator(0, step)) for step in range(200)])
    assert drawn.min() >= 0 and drawn.min() < 5 and drawn.max() <= 999 and drawn.max() > 990
    shares = [((drawn >= low) & (drawn < low + 250)).float().mean().item() for low in (0, 250, 500, 750)]
    assert shares[1] + shares[2] > 0.6 and min(shares) > 0.15, shares


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


def test_little_scenes_keep_held_out_combinations_from_training():
    rng = random.Random(0)
    scenes = [little_scenes.random_scene(rng) for _ in range(6000)]
    drawn = {(item.name, scene.place) for scene in scenes for item in scene.objects}
    assert not any(little_scenes.is_held_out(*pair) for pair in drawn)
    everything = {(name, place) for name in ICONS for place in little_scenes.PLACES}
    held_out = {pair for pair in everything if little_scenes.is_held_out(*pair)}
    assert 0.17 < len(held_out) / len(everything) < 0.23
    assert len(drawn) > 0.9 * len(everything - held_out)
    assert all(item.left >= 0 and item.left + item.side <= little_scenes.SIDE for s in scenes for item in s.objects)


def test_little_scenes_are_said_as_one_would_say_them():
    rng = random.Random(0)
    make = little_scenes.make_scene
    assert make(("octopus",), "under water", "", rng).caption == "an octopus under water"
    assert make(("owl",), "in the snow at night", "large", rng).caption == "a large owl in the snow at night"
    assert make(("cherries",), "on an orange background", "", rng).caption == "cherries on an orange background"
    pair = make(("fox", "umbrella"), "on a beach at sunset", "", rng, colors=False)
    assert pair.caption == "a fox and an umbrella on a beach at sunset"
    assert make(("unicorn",), "in space", "", rng).caption == "a unicorn in space"
