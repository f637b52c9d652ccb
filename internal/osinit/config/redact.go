package config

import (
	"bytes"
	"errors"
	"net/url"
	"slices"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"

	"github.com/cloudos-io/cloudos/internal/fault"
)

// notShown stands for a secret.
const notShown = "(not shown)"

// unreadable stands for a whole document.
const unreadable = "version: 1 # the document has a secret and cannot be shown\n"

// isSecret tells whether a document's value is not shown: the passphrase of the data, the key of the listeners, what
// collectors of traces are shown, and addresses with a password.
func isSecret(path, value string) bool {
	if path == "encryption.passphrase" || path == "tls.key" || strings.HasPrefix(path, "engine.tracing.headers.") {
		return true
	}
	u, err := url.Parse(value)
	if err != nil || u.User == nil {
		return false
	}
	_, has := u.User.Password()
	return has
}

// values visits a document's values that are no mappings and lists, by their path: a.b.0.
func values(n *yaml.Node, path string, visit func(path string, v *yaml.Node)) {
	below := func(name string) string { return strings.TrimPrefix(path+"."+name, ".") }
	switch n.Kind {
	case yaml.DocumentNode:
		for _, c := range n.Content {
			values(c, path, visit)
		}
	case yaml.MappingNode:
		for i := 0; i+1 < len(n.Content); i += 2 {
			values(n.Content[i+1], below(n.Content[i].Value), visit)
		}
	case yaml.SequenceNode:
		for i, c := range n.Content {
			values(c, below(strconv.Itoa(i)), visit)
		}
	default:
		visit(path, n)
	}
}

// Redacted is a document to be shown: without its secrets.
func Redacted(b []byte) []byte {
	var n yaml.Node
	if err := yaml.Unmarshal(b, &n); err != nil || len(n.Content) != 1 || n.Content[0].Kind != yaml.MappingNode {
		for _, word := range []string{"passphrase", "tls", "headers", "@"} {
			if bytes.Contains(b, []byte(word)) {
				return []byte(unreadable)
			}
		}
		return b
	}
	hidden := false
	values(&n, "", func(path string, v *yaml.Node) {
		if isSecret(path, v.Value) {
			*v, hidden = yaml.Node{Kind: yaml.ScalarNode, Tag: "!!str", Value: notShown}, true
		}
	})
	if shows(&n, b) {
		return []byte(unreadable)
	}
	if !hidden {
		return b
	}
	out, err := yaml.Marshal(&n)
	if err != nil {
		return []byte(unreadable)
	}
	return out
}

// shows tells whether a secret of a document is still in what is to be shown: merged in from elsewhere (<<), or under an
// anchor where it is none.
func shows(n *yaml.Node, b []byte) bool {
	var d struct {
		Encryption struct{ Passphrase string }
		TLS        struct{ Key string }
		Engine     struct {
			Tracing struct{ Headers map[string]string }
		}
	}
	if yaml.Unmarshal(b, &d) != nil {
		return true
	}
	const least = 8 // what is shorter is no secret, and may be anywhere
	secrets := []string{d.Encryption.Passphrase, d.TLS.Key}
	for _, h := range d.Engine.Tracing.Headers {
		secrets = append(secrets, h)
	}
	secrets = slices.DeleteFunc(secrets, func(s string) bool { return len(s) < least || s == notShown })
	var in func(n *yaml.Node) bool
	in = func(n *yaml.Node) bool {
		if n.Kind == yaml.ScalarNode && slices.Contains(secrets, n.Value) {
			return true
		}
		return slices.ContainsFunc(n.Content, in)
	}
	return in(n)
}

// Filled is a document that was shown without its secrets, with those of the first of others that has them.
func Filled(b []byte, others ...[]byte) ([]byte, error) {
	if bytes.Contains(b, []byte(strings.TrimSpace(unreadable))) {
		return nil, fault.New(fault.Invalid, "this stands for a document that could not be shown: give one in full")
	}
	if !bytes.Contains(b, []byte(notShown)) {
		return b, nil
	}
	var n yaml.Node
	if err := yaml.Unmarshal(b, &n); err != nil || len(n.Content) != 1 {
		return b, nil // whoever parses it says why
	}
	filled := false
	var errs []error
	values(&n, "", func(path string, v *yaml.Node) {
		if v.Value != notShown {
			return
		}
		for _, o := range others {
			if have := secret(o, path); have != nil {
				*v, filled = *have, true
				return
			}
		}
		errs = append(errs, fault.New(fault.Invalid, "%s is %q, and no document of this machine has it: give it in full", path, notShown))
	})
	if err := errors.Join(errs...); err != nil || !filled {
		return b, err
	}
	var out bytes.Buffer
	e := yaml.NewEncoder(&out)
	e.SetIndent(2)
	if err := errors.Join(e.Encode(&n), e.Close()); err != nil {
		return nil, err
	}
	return out.Bytes(), nil
}

// secret is one of a document's, as a value that nothing else refers to.
func secret(b []byte, of string) *yaml.Node {
	var n, out yaml.Node
	if yaml.Unmarshal(b, &n) != nil {
		return nil
	}
	values(&n, "", func(path string, v *yaml.Node) {
		if v.Kind == yaml.AliasNode {
			v = v.Alias
		}
		if path == of && v.Kind == yaml.ScalarNode && v.Value != "" && isSecret(path, v.Value) {
			out = yaml.Node{Kind: yaml.ScalarNode, Tag: v.Tag, Style: v.Style, Value: v.Value}
		}
	})
	if out.Kind == 0 {
		return nil
	}
	return &out
}
