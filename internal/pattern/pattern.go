// Package pattern has regular expressions that are compiled when they are first used: what
// a program may never ask for is not paid for at its start (ADR 57). Every package that checks
// names imports it.
package pattern

import (
	"regexp"
	"sync"
)

// Pattern is a regular expression of package regexp. It is safe for use by several at a time.
type Pattern struct {
	compile func() *regexp.Regexp
}

// New returns the pattern of an expression; one that does not compile panics at its first use.
func New(expr string) *Pattern {
	return &Pattern{sync.OnceValue(func() *regexp.Regexp { return regexp.MustCompile(expr) })}
}

// MatchString reports whether s has a match.
func (p *Pattern) MatchString(s string) bool { return p.compile().MatchString(s) }

// FindStringSubmatch returns the leftmost match and its groups, or nil.
func (p *Pattern) FindStringSubmatch(s string) []string { return p.compile().FindStringSubmatch(s) }

// ReplaceAllString replaces each match.
func (p *Pattern) ReplaceAllString(s, by string) string { return p.compile().ReplaceAllString(s, by) }
