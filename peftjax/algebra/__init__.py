"""What adapters are to each other: sums of several, the same change in another form."""
