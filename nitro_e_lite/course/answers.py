"""What the exercises of the notebooks are checked against, out of sight of their readers.

Each name is one exercise: the true function and inputs that the notebook does not show. Notebooks hand the
reader's function to `lessons.check` together with one of these.
"""

import math
import re

import torch

from nitro_e_lite.course.lessons import Hidden
from nitro_e_lite.scenes import captions, grammar

_NUMBERS = {"a": 1, "an": 1, "one": 1} | {word: count for count, word in grammar.COUNT_WORDS.items()}
