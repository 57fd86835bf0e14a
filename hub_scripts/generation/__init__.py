"""How new networks are made, beyond drawing latents around anchors."""
