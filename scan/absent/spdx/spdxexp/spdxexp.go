// Package spdxexp checks SPDX license expressions (SPDX 2.3, annex D), with the
// one function that syft calls.
package spdxexp

import (
	_ "embed"
	"strings"
	"sync"
)

// The identifiers of the SPDX license list 3.29, one a line.
//
//go:embed licenses.txt
var list string

var known = sync.OnceValue(func() map[string]bool {
	m := map[string]bool{}
	for l := range strings.Lines(list) {
		m[strings.ToLower(strings.TrimSpace(l))] = true
	}
	return m
})

const (
	maxLength = 4096
	maxDepth  = 50
)

// ValidateLicenses tells whether all are expressions of known licenses, and which
// are not.
func ValidateLicenses(licenses []string) (bool, []string) {
	var bad []string
	for _, l := range licenses {
		if !valid(l) {
			bad = append(bad, l)
		}
	}
	return len(bad) == 0, bad
}

func valid(s string) bool {
	if len(s) > maxLength {
		return false
	}
	s = strings.NewReplacer("(", " ( ", ")", " ) ").Replace(s)
	p := parser{words: strings.Fields(s)}
	return p.expression(0) && len(p.words) == 0
}

type parser struct{ words []string }

func (p *parser) next() string {
	if len(p.words) == 0 {
		return ""
	}
	w := p.words[0]
	p.words = p.words[1:]
	return w
}

func (p *parser) peek() string {
	if len(p.words) == 0 {
		return ""
	}
	return strings.ToUpper(p.words[0])
}

// expression = term *(("AND" / "OR") term)
func (p *parser) expression(depth int) bool {
	if depth > maxDepth || !p.term(depth) {
		return false
	}
	for p.peek() == "AND" || p.peek() == "OR" {
		p.next()
		if !p.term(depth) {
			return false
		}
	}
	return true
}

// term = "(" expression ")" / license ["WITH" exception]
func (p *parser) term(depth int) bool {
	w := p.next()
	if w == "(" {
		return p.expression(depth+1) && p.next() == ")"
	}
	if !license(w) {
		return false
	}
	if p.peek() == "WITH" {
		p.next()
		return identifier(p.next())
	}
	return true
}

func license(w string) bool {
	if i := strings.LastIndexByte(w, ':'); i >= 0 && strings.HasPrefix(w, "DocumentRef-") {
		w = w[i+1:]
		return strings.HasPrefix(w, "LicenseRef-") && identifier(w)
	}
	if strings.HasPrefix(w, "LicenseRef-") {
		return identifier(w)
	}
	w = strings.ToLower(w)
	// GPL-2.0 and GPL-2.0+ are the older names of what the list has as -only and -or-later.
	base := strings.TrimSuffix(w, "+")
	return known()[w] || known()[base] || known()[base+"-only"]
}

// identifier = letters, digits, "-" and "."
func identifier(w string) bool {
	for _, c := range w {
		if !(c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '-' || c == '.') {
			return false
		}
	}
	return w != "" && w != "("
}
