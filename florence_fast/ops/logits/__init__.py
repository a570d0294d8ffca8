"""What the losses over pairs of an image and a text share: checks, order by label, and logits chunk by chunk."""
