package api

// Version is the release of every program of the tree, set at link time.
var Version = "dev"
