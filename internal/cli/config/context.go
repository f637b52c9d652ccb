package config

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// DefaultContext is the name of the engine of this host; it is not stored.
const DefaultContext = "default"

// Context is a named engine.
type Context struct {
	Name          string
	Description   string `json:",omitempty"`
	Host          string
	CA            string `json:",omitempty"`
	Cert          string `json:",omitempty"`
	Key           string `json:",omitempty"`
	ServerName    string `json:",omitempty"`
	SkipTLSVerify bool   `json:",omitempty"`
}

// TLS reports whether the context has TLS material.
func (c *Context) TLS() bool {
	return c.CA != "" || c.Cert != "" || c.Key != "" || c.SkipTLSVerify || c.ServerName != ""
}

func contextPath(dir, name string) string {
	return filepath.Join(dir, "contexts", name+".json")
}

// ErrNoContext is wrapped when a context does not exist.
var ErrNoContext = errors.New("no such context")

// LoadContext reads a stored context.
func LoadContext(dir, name string) (*Context, error) {
	if !ValidName(name) {
		return nil, fmt.Errorf("%q is not a context's name", name)
	}
	b, err := os.ReadFile(contextPath(dir, name))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w: %s (list them with 'servin context ls')", ErrNoContext, name)
	}
	if err != nil {
		return nil, err
	}
	c := new(Context)
	if err := json.Unmarshal(b, c); err != nil {
		return nil, fmt.Errorf("cannot read context %s: %w", name, err)
	}
	c.Name = name
	return c, nil
}

// SaveContext stores a context.
func SaveContext(dir string, c *Context) error {
	b, err := json.MarshalIndent(c, "", "\t")
	if err != nil {
		return err
	}
	return WriteFile(contextPath(dir, c.Name), append(b, '\n'), 0o600)
}

// RemoveContext removes a stored context.
func RemoveContext(dir, name string) error {
	if !ValidName(name) {
		return fmt.Errorf("%q is not a context's name", name)
	}
	err := os.Remove(contextPath(dir, name))
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w: %s", ErrNoContext, name)
	}
	return err
}

// Contexts lists stored contexts by name.
func Contexts(dir string) ([]*Context, error) {
	names, err := os.ReadDir(filepath.Join(dir, "contexts"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	var out []*Context
	for _, n := range names {
		name, ok := strings.CutSuffix(n.Name(), ".json")
		if !ok || !ValidName(name) {
			continue
		}
		c, err := LoadContext(dir, name)
		if err != nil {
			return nil, err
		}
		out = append(out, c)
	}
	slices.SortFunc(out, func(a, b *Context) int { return strings.Compare(a.Name, b.Name) })
	return out, nil
}
