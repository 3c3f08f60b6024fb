"""Open the page:  python -m minilora.apps.page  (or minilora-page)."""

from minilora.settings.command_line import page

if __name__ == "__main__":
    page()
