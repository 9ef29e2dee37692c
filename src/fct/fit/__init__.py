"""Training of side-information, backbones, BCT and the transformation. Imports torch; ``import fct`` does not."""
