"""h as a file: the transformation, its layers, and the formats it comes from and goes to."""
