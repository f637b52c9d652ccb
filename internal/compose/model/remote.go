package model

import (
	"context"
	"fmt"
	"strings"
)

// remote takes the addresses of Git repositories and registries for what they
// are, where they would be sought as files: Compose files are read from disk only.
type remote struct{}

func (remote) Accept(path string) bool {
	scheme, _, ok := strings.Cut(path, "://")
	if ok {
		switch scheme {
		case "http", "https", "git", "ssh", "oci":
			return true
		}
	}
	return strings.HasPrefix(path, "git@") || strings.HasPrefix(path, "github.com/")
}

func (remote) Load(_ context.Context, path string) (string, error) {
	return "", fmt.Errorf("cannot read %s: Compose files are read from disk only; fetch it first and name the file", path)
}

func (remote) Dir(string) string { return "" }
