"""The drawn world, the oracle that reads it, and the rule that keeps captions from training."""

import copy
import random
from dataclasses import replace

import numpy as np
import torch
from PIL import Image
from torch import nn

from training import scenes
from training.artwork import ICONS, template
from training.common import fingerprint, optimizer_step, resume, save_state, step_generator
from training.evaluate import choose_cases, choose_coloured, shares
from training.optimizers import WEIGHT_DECAY, MatrixOptimizer, orthogonalized
from training.oracle import read_picture
from training.places import draw_place
from training.train_denoiser import draw_timesteps


def test_oracle_reads_true_scenes_and_accepts_neither_noise_nor_other_pictures():
    cases = [case for half in choose_cases(60, seed=7).values() for case in half]
    pictures = [scenes.draw_scene(case.scene, scenes.SIDE, template) for case in cases]
    assert shares(cases, pictures)["both"] >= 99
    assert shares(cases, pictures[1:] + pictures[:1])["both"] <= 2
    coloured = choose_coloured(40)
    drawn = [scenes.draw_scene(case.scene, scenes.SIDE, template) for case in coloured]
    assert shares(coloured, drawn)["both"] == 100
    plain = [replace(case.scene, objects=(replace(case.scene.objects[0], color=None),)) for case in coloured]
    assert shares(coloured, [scenes.draw_scene(scene, scenes.SIDE, template) for scene in plain])["object"] == 0
    rng = np.random.default_rng(0)
    noise = [Image.fromarray(rng.integers(0, 256, (128, 128, 3), np.uint8)) for _ in range(20)]
    assert shares(cases[:20], noise)["object"] == 0


def test_oracle_sees_nothing_in_an_empty_place():
    noise = np.random.default_rng(0)
    for place in ("in the snow", "on a beach at sunset", "on a black background", "in space"):
        bare = np.asarray(draw_place(place, 0, scenes.SIDE), float)
        for strength in (0, 2, 10):
            seen = np.clip(bare + strength * noise.standard_normal(bare.shape), 0, 255).astype(np.uint8)
            assert not read_picture(Image.fromarray(seen)).clear, (place, strength)


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


def test_matrices_move_as_torch_moves_them_one_by_one():
    torch.manual_seed(0)  # wide, tall and square ones, two of a shape
    ours = nn.Sequential(nn.Conv2d(8, 16, 3), nn.Conv2d(16, 8, 3), nn.Flatten(), nn.Linear(128, 32), nn.Linear(32, 64))
    ours += nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    theirs = copy.deepcopy(ours)
    before = [parameter.detach().clone() for parameter in ours.parameters()]
    matrices = [parameter for parameter in theirs.parameters() if parameter.ndim >= 2]
    flat = [nn.Parameter(parameter.data.flatten(1)) for parameter in matrices]  # they share the layers' memory
    rest = torch.optim.AdamW([p for p in theirs.parameters() if p.ndim < 2], lr=1e-2, weight_decay=WEIGHT_DECAY)
    muon = torch.optim.Muon(flat, lr=1e-2, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw")
    optimizer = MatrixOptimizer(ours, 1e-2, torch.bfloat16)
    for _ in range(2):
        x = torch.randn(64, 8, 8, 8)
        optimizer.step(ours(x).square().mean(), 1e-2)
        theirs.zero_grad()
        theirs(x).square().mean().backward()
        nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        for parameter, matrix in zip(matrices, flat, strict=True):
            matrix.grad = parameter.grad.flatten(1)
        muon.step()
        rest.step()
    for start, mine, other in zip(before, ours.parameters(), theirs.parameters(), strict=True):
        moved, reference = (mine - start).flatten(), (other - start).flatten()
        # bfloat16 rounds what is added in another order differently
        assert (moved - reference).norm() < 0.1 * reference.norm(), mine.shape


def test_matrices_become_orthogonal_and_decay_and_their_momentum_is_kept():
    torch.manual_seed(0)
    for shape in ((3, 20, 50), (3, 50, 20)):
        values = torch.linalg.svdvals(orthogonalized(torch.randn(shape), torch.float32))
        assert values.min() > 0.6 and values.max() < 1.3, values
    layer = nn.Linear(8, 8)
    start, optimizer = layer.weight.detach().clone(), MatrixOptimizer(layer, 0.1, torch.float32)
    optimizer.step((0 * layer(torch.ones(1, 8))).sum(), 0.1)
    torch.testing.assert_close(layer.weight.detach(), (1 - 0.1 * WEIGHT_DECAY) * start)

    optimizer.step(layer(torch.randn(4, 8)).square().sum(), 0.1)
    other = copy.deepcopy(layer)
    second, x = MatrixOptimizer(other, 0.1, torch.float32), torch.randn(4, 8)
    second.load_state_dict(optimizer.state_dict())
    for model, its in ((layer, optimizer), (other, second)):
        its.step(model(x).square().sum(), 0.1)
    torch.testing.assert_close(other.weight, layer.weight)


def test_timesteps_cover_the_schedule_and_dwell_where_captions_decide():
    drawn = torch.cat([draw_timesteps(48, 1000, step_generator(0, step)) for step in range(200)])
    assert drawn.min() >= 0 and drawn.min() < 5 and drawn.max() <= 999 and drawn.max() > 990
    shares = [((drawn >= low) & (drawn < low + 250)).float().mean().item() for low in (0, 250, 500, 750)]
    assert shares[1] + shares[2] > 0.6 and min(shares) > 0.15, shares


def test_what_is_evaluated_is_half_held_out():
    halves = choose_cases(120)
    for half, held_out in (("never trained on", True), ("trained on", False)):
        pairs = [(item.name, case.scene.place) for case in halves[half] for item in case.scene.objects]
        assert all(scenes.is_held_out(*pair) == held_out for pair in pairs)
        assert len(halves[half]) == 120 and {case.scene.size for case in halves[half]} == set(scenes.SIZES)


def test_scenes_keep_held_out_combinations_from_training():
    rng = random.Random(0)
    drawn_scenes = [scenes.random_scene(rng) for _ in range(6000)]
    drawn = {(item.name, scene.place) for scene in drawn_scenes for item in scene.objects}
    assert not any(scenes.is_held_out(*pair) for pair in drawn)
    everything = {(name, place) for name in ICONS for place in scenes.PLACES}
    held_out = {pair for pair in everything if scenes.is_held_out(*pair)}
    assert 0.17 < len(held_out) / len(everything) < 0.23
    assert len(drawn) > 0.9 * len(everything - held_out)
    assert all(item.left >= 0 and item.left + item.side <= scenes.SIDE for s in drawn_scenes for item in s.objects)


def test_scenes_are_said_as_one_would_say_them():
    rng = random.Random(0)
    make = scenes.make_scene
    assert make(("octopus",), "under water", "", rng).caption == "an octopus under water"
    assert make(("owl",), "in the snow at night", "large", rng).caption == "a large owl in the snow at night"
    assert make(("cherries",), "on an orange background", "", rng).caption == "cherries on an orange background"
    pair = make(("fox", "umbrella"), "on a beach at sunset", "", rng, colors=False)
    assert pair.caption == "a fox and an umbrella on a beach at sunset"
    assert make(("unicorn",), "in space", "", rng).caption == "a unicorn in space"
