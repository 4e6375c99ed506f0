"""Decides: what a film consists of, what is done, what comes next. Pure Python; loads neither torch nor ray."""
