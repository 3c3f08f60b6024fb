"""What the user says: every setting, declared once; the command line and JSON files that give them; a user's mistake.

Imports nothing of ours.
"""
