# What ships has no hooks for tests; those of the checked build are in ../checked.
