"""The embedded checkpoint understands its captions, as far as the oracle can tell on a few pictures."""

import pytest

from training.evaluate import SINGLE, choose_cases, choose_coloured, generate, shares
from training.oracle import read_picture
from training.scenes import example_picture


def test_pictures_of_captions_never_trained_on_match_them(pipe):
    everything = choose_cases(20)["never trained on"]
    bounds = {"one object": 95, "two objects": 80, "in a colour": 75}
    groups = [
        [case for case in everything if case.scene.size in SINGLE],
        [case for case in everything if case.scene.size == "pair"],
        choose_coloured(8),
    ]
    for (name, bound), cases in zip(bounds.items(), groups, strict=True):
        found = shares(cases, generate(pipe, cases))
        print(name, len(cases), found)
        assert found["both"] >= bound, (name, found)


@pytest.mark.at_length
def test_a_negative_prompt_drives_what_it_names_away(pipe):
    seeds = list(range(12))
    plain = [read_picture(picture).place for picture in pipe(["a dog"] * 12, seed=seeds).images]
    place = max(plain, key=plain.count)  # one that is there to be driven away
    steered = pipe(["a dog"] * 12, negative_prompt=place, seed=seeds).images
    left = sum(read_picture(picture).place == place for picture in steered)
    print(f"{plain.count(place)} of 12 are {place}, {left} with the negative prompt")
    assert plain.count(place) >= 2 and left < plain.count(place)


def test_image_to_image_changes_what_the_prompt_says_and_keeps_what_it_can(pipe):
    source = example_picture("house", "in a meadow")
    made = pipe(["a castle in a meadow"] * 8, image=source, strength=0.85, seed=list(range(8))).images
    readings = [read_picture(picture) for picture in made]
    assert sum("castle" in reading.objects for reading in readings) >= 7
    assert sum(reading.place == "in a meadow" for reading in readings) >= 7
