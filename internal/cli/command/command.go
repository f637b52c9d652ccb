// Package command is the shape of a command line: a tree of commands with flags,
// from which parsing, help, completion and the reference pages are derived.
//
// A command declares its flags in a function that runs only when that command
// was chosen, so that a large tree costs a start-up nothing.
package command

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
)

// Command is one command or, with Sub, a group of them.
type Command struct {
	Name    string
	Aliases []string
	// Args is the usage after the options: "CONTAINER [CONTAINER...]".
	Args string
	// Short is one line for lists, Long the paragraph of the help (Short if empty).
	Short, Long string
	// Example lines are shown as they are.
	Example string
	// Group is the heading in the parent's help.
	Group  string
	Hidden bool
	// Min and Max bound the number of arguments; Max -1 is no bound.
	Min, Max int
	// Inner ends flag parsing at the first argument: the rest belongs to another
	// program.
	Inner bool
	// Raw leaves all arguments unparsed.
	Raw bool
	// Complete names what the arguments are: "container", "image", "file" and so
	// on; the caller of Candidates knows the words. With several, the nth is for
	// the nth argument and the last for all further ones.
	Complete []string
	Flags    func(*FlagSet)
	Run      func(ctx context.Context, args []string) error
	Sub      func() []*Command
	// Default names the subcommand that a group runs when none is named. With
	// DefaultArgs a word that is no subcommand is its argument.
	Default     string
	DefaultArgs bool
}

// UsageError is a command line that does not parse.
type UsageError struct {
	// Path is the command ("servin images pull").
	Path string
	// Flag tells that a flag was wrong, not the number of arguments.
	Flag bool
	Err  error
}

func (e *UsageError) Error() string {
	return fmt.Sprintf("%v\nSee '%s --help'", e.Err, e.Path)
}

func (e *UsageError) Unwrap() error { return e.Err }

// UnknownError is a command that the tree lacks.
type UnknownError struct {
	Path, Name string
	// Nested tells that the parent is a group, not the root.
	Nested     bool
	Suggestion string
	// Rest is what follows the name.
	Rest []string
}

func (e *UnknownError) Error() string {
	s := fmt.Sprintf("%q is not a command of %s", e.Name, e.Path)
	if e.Suggestion != "" {
		s += fmt.Sprintf("; did you mean '%s %s'?", e.Path, e.Suggestion)
	}
	return s + fmt.Sprintf("\nSee '%s --help'", e.Path)
}

// Is reports whether name calls c.
func (c *Command) Is(name string) bool {
	return c.Name == name || slices.Contains(c.Aliases, name)
}

// Find looks up a subcommand.
func (c *Command) Find(name string) *Command {
	if c.Sub == nil {
		return nil
	}
	for _, s := range c.Sub() {
		if s.Is(name) {
			return s
		}
	}
	return nil
}

// Invocation is a parsed command line, ready to run.
type Invocation struct {
	Command *Command
	Path    string // "servin images pull"
	Args    []string
	Help    bool
	// Flags are the command's, as parsed.
	Flags *FlagSet
}

// Parse finds the command that args call below root and parses its flags. The
// flags of root (and those alone) are accepted before every command word.
func Parse(root *Command, args []string) (*Invocation, error) {
	global := new(FlagSet)
	if root.Flags != nil {
		root.Flags(global)
	}
	cmd, path := root, root.Name
	for {
		if cmd.Default != "" && cmd.defaults(args) {
			cmd = cmd.Find(cmd.Default)
			path += " " + cmd.Name
			break
		}
		rest, err := global.Parse(args, false)
		if errors.Is(err, ErrHelp) {
			return &Invocation{Command: cmd, Path: path, Help: true, Flags: global}, nil
		}
		if err != nil {
			return nil, &UsageError{Path: path, Flag: true, Err: err}
		}
		if cmd.Sub == nil || len(rest) == 0 {
			return &Invocation{Command: cmd, Path: path, Help: true, Flags: global}, nil
		}
		next := cmd.Find(rest[0])
		if next == nil {
			return nil, &UnknownError{Path: path, Name: rest[0], Nested: cmd != root, Suggestion: suggest(cmd, rest[0]), Rest: rest[1:]}
		}
		cmd, path, args = next, path+" "+next.Name, rest[1:]
		if cmd.Sub == nil {
			break
		}
	}
	inv := &Invocation{Command: cmd, Path: path, Args: args, Flags: new(FlagSet)}
	if cmd.Raw {
		return inv, nil
	}
	if cmd.Flags != nil {
		cmd.Flags(inv.Flags)
	}
	var err error
	inv.Args, err = inv.Flags.Parse(args, !cmd.Inner)
	if errors.Is(err, ErrHelp) {
		inv.Help = true
		return inv, nil
	}
	if err != nil {
		return nil, &UsageError{Path: path, Flag: true, Err: err}
	}
	if err := cmd.checkArgs(len(inv.Args)); err != nil {
		return nil, &UsageError{Path: path, Err: err}
	}
	return inv, nil
}

// defaults reports whether args mean the group's default subcommand.
func (c *Command) defaults(args []string) bool {
	if len(args) == 0 {
		return true
	}
	if a := args[0]; len(a) > 1 && a[0] == '-' {
		return a != "-h" && a != "--help"
	}
	return c.DefaultArgs && c.Find(args[0]) == nil && args[0] != "help"
}

func (c *Command) checkArgs(n int) error {
	switch {
	case n < c.Min && c.Min == c.Max:
		return fmt.Errorf("needs %s (%s)", count(c.Min), c.Args)
	case n < c.Min:
		return fmt.Errorf("needs at least %s (%s)", count(c.Min), c.Args)
	case c.Max >= 0 && n > c.Max && c.Max == 0:
		return errors.New("takes no arguments")
	case c.Max >= 0 && n > c.Max:
		return fmt.Errorf("takes at most %s (%s)", count(c.Max), c.Args)
	}
	return nil
}

func count(n int) string {
	if n == 1 {
		return "1 argument"
	}
	return fmt.Sprintf("%d arguments", n)
}

// suggest finds the visible command closest to a mistyped one.
func suggest(c *Command, name string) string {
	best, dist := "", 1+min(2, len(name)/3)
	if c.Sub == nil {
		return ""
	}
	for _, s := range c.Sub() {
		if s.Hidden {
			continue
		}
		for _, n := range append([]string{s.Name}, s.Aliases...) {
			d := distance(name, n)
			if d < dist || (len(name) > 2 && strings.HasPrefix(n, name) && dist > 1) {
				best, dist = n, min(d, 1)
			}
		}
	}
	return best
}

// distance counts typing mistakes: letters that are missing, too many, other ones,
// or two in the wrong order (Damerau's, restricted).
func distance(a, b string) int {
	var before []int // the row before last
	last := make([]int, len(b)+1)
	for j := range last {
		last[j] = j
	}
	for i := 1; i <= len(a); i++ {
		row := make([]int, len(b)+1)
		row[0] = i
		for j := 1; j <= len(b); j++ {
			cost := 1
			if a[i-1] == b[j-1] {
				cost = 0
			}
			row[j] = min(last[j]+1, row[j-1]+1, last[j-1]+cost)
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				row[j] = min(row[j], before[j-2]+1)
			}
		}
		before, last = last, row
	}
	return last[len(b)]
}

// Walk visits c and everything below it that is not hidden, parents first.
func Walk(c *Command, path string, fn func(c *Command, path string)) {
	fn(c, path)
	if c.Sub == nil {
		return
	}
	for _, s := range c.Sub() {
		if !s.Hidden {
			Walk(s, path+" "+s.Name, fn)
		}
	}
}

// WriteHelp prints a command's help. Extra headings follow a group's commands.
func WriteHelp(w io.Writer, c *Command, path string, isRoot bool, extra ...Section) error {
	var b strings.Builder
	usage := path
	switch {
	case c.Sub != nil:
		if isRoot {
			usage += " [OPTIONS]"
		}
		usage += " COMMAND"
	case c.Raw:
		usage += " [ARG...]"
	default:
		if hasFlags(c) {
			usage += " [OPTIONS]"
		}
		if c.Args != "" {
			usage += " " + c.Args
		}
	}
	fmt.Fprintf(&b, "Usage:  %s\n\n", usage)
	if c.Long != "" {
		fmt.Fprintf(&b, "%s\n", strings.TrimRight(c.Long, "\n"))
	} else {
		fmt.Fprintf(&b, "%s\n", c.Short)
	}
	if len(c.Aliases) > 0 && !isRoot {
		parent := path[:strings.LastIndexByte(path, ' ')+1]
		names := []string{path}
		for _, a := range c.Aliases {
			names = append(names, parent+a)
		}
		fmt.Fprintf(&b, "\nAliases:\n  %s\n", strings.Join(names, ", "))
	}
	if c.Sub != nil {
		for _, s := range append(sections(c), extra...) {
			writeSection(&b, s)
		}
	}
	if c.Example != "" {
		fmt.Fprintf(&b, "\nExamples:\n  %s\n", strings.ReplaceAll(strings.TrimSpace(c.Example), "\n", "\n  "))
	}
	if c.Flags != nil {
		fs := new(FlagSet)
		c.Flags(fs)
		if lines := fs.usage(); lines != "" {
			title := "Options"
			if isRoot {
				title = "Global options"
			}
			fmt.Fprintf(&b, "\n%s:\n%s", title, lines)
		}
	}
	if c.Sub != nil {
		fmt.Fprintf(&b, "\nRun '%s COMMAND --help' for more about a command.\n", path)
	}
	_, err := io.WriteString(w, b.String())
	return err
}

func hasFlags(c *Command) bool {
	if c.Flags == nil {
		return false
	}
	fs := new(FlagSet)
	c.Flags(fs)
	return len(fs.flags) > 0
}

// Section is a headed list in a group's help.
type Section struct {
	Title string
	Items [][2]string // name, what it does
}

func sections(c *Command) []Section {
	var out []Section
	for _, s := range c.Sub() {
		if s.Hidden {
			continue
		}
		title := s.Group
		if title == "" {
			title = "Commands"
		}
		i := slices.IndexFunc(out, func(x Section) bool { return x.Title == title })
		if i < 0 {
			i = len(out)
			out = append(out, Section{Title: title})
		}
		out[i].Items = append(out[i].Items, [2]string{s.Name, s.Short})
	}
	return out
}

func writeSection(b *strings.Builder, s Section) {
	if len(s.Items) == 0 {
		return
	}
	width := 0
	for _, it := range s.Items {
		width = max(width, len(it[0]))
	}
	fmt.Fprintf(b, "\n%s:\n", s.Title)
	for _, it := range s.Items {
		fmt.Fprintf(b, "  %-*s  %s\n", width, it[0], it[1])
	}
}
