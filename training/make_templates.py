"""Draw the objects of the world into one small picture: ``python -m training.make_templates``.

The oracle and the tests use it, so that they need neither a network nor the artwork's package.
"""

from PIL import Image

from training.artwork import COLUMNS, ICONS, TEMPLATE_SIDE, TEMPLATES, sprite


def main() -> None:
    rows = -(-len(ICONS) // COLUMNS)
    sheet = Image.new("RGBA", (COLUMNS * TEMPLATE_SIDE, rows * TEMPLATE_SIDE))
    for i, name in enumerate(ICONS):
        place = (i % COLUMNS * TEMPLATE_SIDE, i // COLUMNS * TEMPLATE_SIDE)
        sheet.paste(sprite(name, TEMPLATE_SIDE), place)
    TEMPLATES.parent.mkdir(exist_ok=True)
    sheet.save(TEMPLATES, optimize=True)
    print(f"{TEMPLATES}: {len(ICONS)} objects, {TEMPLATES.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
