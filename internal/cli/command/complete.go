package command

import (
	"strings"
)

// Candidate is a word that could come next.
type Candidate struct{ Word, Help string }

// Completion is what could stand where the cursor is.
type Completion struct {
	// Candidates are known already.
	Candidates []Candidate
	// Kind names what else could: the Complete of a flag or argument, "" for
	// nothing. Prefix is what is typed of it, and Before what the shell has in
	// the same word before it ("--flag=").
	Kind, Prefix, Before string
	// Args are the arguments before the one that is typed.
	Args []string
}

// Complete looks at a command line without the program's name, whose last word
// is being typed (and may be empty).
func Complete(root *Command, words []string) Completion {
	if len(words) == 0 {
		words = []string{""}
	}
	cur := words[len(words)-1]
	words = words[:len(words)-1]
	cmd := root
	fs := new(FlagSet)
	if root.Flags != nil {
		root.Flags(fs)
	}
	var args []string
	var pending *Flag
	ended := false
	for _, w := range words {
		switch {
		case pending != nil:
			pending = nil
		case !ended && w == "--":
			ended = true
		case !ended && strings.HasPrefix(w, "--"):
			if fl := fs.long(strings.TrimPrefix(w, "--")); fl != nil && fl.optional == "" {
				pending = fl
			}
		case !ended && len(w) > 1 && w[0] == '-':
			pending = fs.openShort(w[1:])
		case cmd.Sub != nil:
			next := cmd.Find(w)
			if next == nil {
				if cmd.DefaultArgs {
					cmd = cmd.Find(cmd.Default)
					args = append(args, w)
					break
				}
				return Completion{}
			}
			cmd = next
			if cmd.Sub == nil {
				fs = new(FlagSet)
				if cmd.Flags != nil {
					cmd.Flags(fs)
				}
			}
		default:
			args = append(args, w)
			if cmd.Inner {
				ended = true
			}
		}
	}
	c := Completion{Args: args, Prefix: cur}
	switch {
	case pending != nil:
		c.Kind = pending.Complete
	case !ended && strings.HasPrefix(cur, "--") && strings.Contains(cur, "="):
		name, value, _ := strings.Cut(cur[2:], "=")
		if fl := fs.long(name); fl != nil {
			c.Kind, c.Prefix, c.Before = fl.Complete, value, "--"+name+"="
		}
	case !ended && strings.HasPrefix(cur, "-"):
		for _, fl := range fs.All() {
			if w := "--" + fl.Name; strings.HasPrefix(w, cur) {
				c.Candidates = append(c.Candidates, Candidate{w, firstLine(fl.Help)})
			}
		}
	case cmd.Sub != nil:
		for _, s := range cmd.Sub() {
			if !s.Hidden && strings.HasPrefix(s.Name, cur) {
				c.Candidates = append(c.Candidates, Candidate{s.Name, s.Short})
			}
		}
		if cmd == root {
			c.Kind = "plugin"
		}
	default:
		if n := len(cmd.Complete); n > 0 && (cmd.Max < 0 || len(args) < cmd.Max) {
			c.Kind = cmd.Complete[min(len(args), n-1)]
		}
	}
	return c
}

// openShort gives the flag at the end of -abc that still wants its value.
func (f *FlagSet) openShort(s string) *Flag {
	for i := range s {
		fl := f.short(s[i : i+1])
		if fl == nil {
			return nil
		}
		if fl.optional == "" {
			if i == len(s)-1 {
				return fl
			}
			return nil
		}
	}
	return nil
}

func firstLine(s string) string {
	s, _, _ = strings.Cut(s, "\n")
	return s
}
