"""Open the page:  python -m minilora.apps.page  (or minilora-page)."""

from ...settings.errors import UserError
from ...settings.page import PageConfig
from ...settings.setting import is_installed


def serve(config: PageConfig) -> None:
    """Open the page; UserError if the package gradio is missing."""
    if not is_installed("gradio"):
        raise UserError("the page needs the package gradio; run: pip install -e '.[page]'")
    from .server import serve as work

    work(config)


if __name__ == "__main__":
    from ...settings.command_line import page

    page()
