"""A page in the browser, for this machine only: pictures and captions, training, drawing, merging.

server.py keeps others out and assembles the tabs.  form.py turns settings into forms, and forms into the words of a
command line.  Each tab is a file; those for training, drawing and merging show the command that does the same.
"""
