"""Where models come from: what a reference means, the files behind it, and the checkpoints inside them."""
