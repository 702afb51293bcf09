"""`python -m calibration.settings.table` prints the table of settings that docs/reference/recipe.md holds."""

from calibration.settings.flags import default_text, flag_of
from calibration.settings.recipe import Recipe


def settings_table() -> str:
    """A row of Markdown for every setting: name, flag, default, meaning."""
    rows = [
        f"| `{name}` | `{flag_of(name, field).replace('/', '`, `')}` | `{default_text(field)}` | {field.description} |"
        for name, field in Recipe.model_fields.items()
    ]
    return "\n".join(["| setting | flag | default | meaning |", "|---|---|---|---|", *rows])


if __name__ == "__main__":
    print(settings_table())
