"""What a run tells its user: lines on the console, the result card, the picture of the loss."""
