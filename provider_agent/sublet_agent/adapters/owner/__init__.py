"""What the owner sees and says: screen, dashboard, commands, the control socket."""
