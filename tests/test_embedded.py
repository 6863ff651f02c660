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
    prompt, negative = pipe.defaults["negative_example"]
    seeds = list(range(16))

    def count(**arguments):
        pictures = pipe([prompt] * 16, seed=seeds, **arguments).images
        return sum(negative in read_picture(picture).place for picture in pictures)

    plain, steered = count(), count(negative_prompt=negative)
    print(f"{plain} of 16 are {negative}, {steered} with the negative prompt")
    assert plain >= 2 and steered < plain


def test_image_to_image_changes_what_the_prompt_says_and_keeps_what_it_can(pipe):
    source = example_picture("house", "in a meadow")
    made = pipe(["a castle in a meadow"] * 8, image=source, strength=0.85, seed=list(range(8))).images
    readings = [read_picture(picture) for picture in made]
    assert sum("castle" in reading.objects for reading in readings) >= 6
    assert sum(reading.place == "in a meadow" for reading in readings) >= 6


def test_a_colour_in_words_colours_the_object_alone(pipe):
    colors = ["red", "blue", "green", "yellow"]
    made = pipe([f"a {color} car on a white background" for color in colors], seed=[1, 2, 3, 4]).images
    readings = [read_picture(picture) for picture in made]
    assert (
        sum(r.colors[0] == c or (c == "red" and r.colors[0] is None) for r, c in zip(readings, colors, strict=True))
        >= 3
    )
    assert all(reading.place == "on a white background" for reading in readings)
