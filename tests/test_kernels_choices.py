from grug_native.kernels.choices import Choice, note_choice, noted_choices


def test_the_first_note_of_each_choice_is_kept() -> None:
    note_choice("attention", "nobody", "listens")
    with noted_choices() as outer:
        note_choice("attention", "blocked", "dense products")
        note_choice("attention", "reference", "later")
        with noted_choices() as inner:
            note_choice("layers", "scanned", "many")
    assert outer == {"attention": Choice("attention", "blocked", "dense products")}
    assert list(inner) == ["layers"]
