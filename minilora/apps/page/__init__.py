"""A page in the browser, for this machine only: pictures and captions, training, drawing, merging.

server.py keeps others out and puts the rooms together.  form.py makes forms from settings, and from forms the words of
a command line.  Each room is a file, and does what the command does that it shows.
"""

from ...settings.errors import UserError
from ...settings.page import PageConfig
from ...settings.setting import is_installed


def serve(config: PageConfig) -> None:
    """Open the page; UserError without the package that it is made of."""
    if not is_installed("gradio"):
        raise UserError("the page needs the package gradio; type: pip install -e '.[page]'")
    from .server import serve as work

    work(config)
