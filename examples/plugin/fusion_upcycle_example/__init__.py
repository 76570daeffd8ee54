"""What a package of your own adds: two initialisers and an MoE family."""
