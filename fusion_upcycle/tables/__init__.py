"""Tables of examples: labelled images, inputs with targets, and how they are read."""
