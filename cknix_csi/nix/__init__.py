"""Everything that talks to Nix: commands, evaluation, builds, closures, databases, GC roots and the binary cache."""
