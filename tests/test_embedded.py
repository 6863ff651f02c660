"""The embedded checkpoint understands its captions, as far as the oracle can tell on a few pictures."""

from training.evaluate import accuracy, choose_cases, generate
from training.oracle import read_picture
from training.scenes import PALETTE


def test_pictures_of_captions_never_trained_on_match_them(pipe):
    cases = choose_cases(24)["never trained on"]
    shares = accuracy(cases, generate(pipe, cases))
    assert min(shares["background"], shares["color"], shares["size"]) >= 95, shares
    assert shares["shape"] >= 85 and shares["all four"] >= 80, shares


def test_a_negative_prompt_drives_its_colour_away(pipe):
    seeds = list(range(16))
    plain = pipe(["a large circle"] * 16, seed=seeds).images
    drawn = [read_picture(picture).background for picture in plain]
    color = max(PALETTE, key=drawn.count)  # one that is there to be driven away
    steered = pipe(["a large circle"] * 16, negative_prompt=f"a {color} background", seed=seeds).images

    def count(pictures):
        return sum(read_picture(picture).background == color for picture in pictures)

    helped = pipe([f"a large circle on a {color} background"] * 16, seed=seeds).images
    assert count(helped) >= 14
    assert count(plain) >= 2 and count(steered) < count(plain)
