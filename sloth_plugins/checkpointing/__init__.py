"""A memory budget instead of a switch: what each decoder layer keeps, offloads and recomputes.

facts   what a model's step holds and computes, from its config        rates     how fast a device is
plan    the fastest step within a budget, a pure function              execute   carrying a plan out
picture the plan as a PNG
"""
