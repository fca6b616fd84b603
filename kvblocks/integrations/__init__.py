"""Model libraries on kvblocks, one module each. Imports none of them: each is needed by its own module only."""
