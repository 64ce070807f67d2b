"""What guesses the tokens that come next: the text itself, or a smaller model."""
