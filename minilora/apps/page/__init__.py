"""A page in the browser, for this machine only: pictures and captions, training, drawing, merging.

server.py keeps others out and puts the rooms together.  form.py makes forms from settings, and from forms the words of
a command line.  Each room is a file, and does what the command does that it shows.
"""
