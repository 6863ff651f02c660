"""The embedded checkpoint understands its captions, as far as the oracle can tell on a few pictures."""

from training.evaluate import SINGLE, choose_cases, generate, shares
from training.oracle import read_picture
from training.scenes import example_picture


def test_pictures_of_captions_never_trained_on_match_them(pipe):
    cases = [case for case in choose_cases(40)["never trained on"] if case.scene.size in SINGLE]
    found = shares(cases, generate(pipe, cases))
    print(len(cases), found)
    assert found["object"] >= 85 and found["place"] >= 90 and found["both"] >= 80, found


def test_a_negative_prompt_drives_what_it_names_away(pipe):
    seeds = list(range(16))
    plain = [read_picture(picture).place for picture in pipe(["a dog"] * 16, seed=seeds).images]
    place = max(plain, key=plain.count)  # one that is there to be driven away
    steered = pipe(["a dog"] * 16, negative_prompt=place, seed=seeds).images
    left = sum(read_picture(picture).place == place for picture in steered)
    print(f"{plain.count(place)} of 16 are {place}, {left} with the negative prompt")
    assert plain.count(place) >= 2 and left < plain.count(place)


def test_image_to_image_changes_what_the_prompt_says_and_keeps_what_it_can(pipe):
    source = example_picture("house", "in a meadow")
    made = pipe(["a castle in a meadow"] * 8, image=source, strength=0.85, seed=list(range(8))).images
    readings = [read_picture(picture) for picture in made]
    assert sum("castle" in reading.objects for reading in readings) >= 6
    assert sum(reading.place == "in a meadow" for reading in readings) >= 6
