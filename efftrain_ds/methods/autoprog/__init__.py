"""AutoProg: automated progressive learning (depth and resolution grow in stages), and staged unfreezing."""
