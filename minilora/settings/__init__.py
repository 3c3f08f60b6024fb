"""User input: every setting, declared once; the command line and JSON files that give them; the user's mistakes.

Imports no other folder of ours.
"""
