"""What is learnt from: pictures and captions, found, checked and cropped; the draws that say which one stands where.

May import models, files and settings.
"""
