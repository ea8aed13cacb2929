"""Making experts smaller: from matrices in 16 bits to encoded rows, and what the choice of an encoding depends on."""
