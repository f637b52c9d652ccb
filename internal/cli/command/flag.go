package command

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"
)

// ErrHelp is returned when --help (or -h where nothing else has it) is met.
var ErrHelp = errors.New("help asked for")

// Flag is one option.
type Flag struct {
	Name, Short string
	// Type is the word for the value in the help; "" for a switch.
	Type string
	Help string
	// Default is shown in the help unless empty.
	Default string
	Hidden  bool
	// Complete names what the value is, as Command.Complete.
	Complete string
	Changed  bool

	// optional is what a flag without "=value" means: "true" for switches.
	optional string
	set      func(string) error
}

// FlagSet is the flags of one command.
type FlagSet struct {
	flags []*Flag
}

// Add declares a flag; set receives each value given.
func (f *FlagSet) Add(name, short, typ, help string, set func(string) error) *Flag {
	fl := &Flag{Name: name, Short: short, Type: typ, Help: help, set: set}
	f.flags = append(f.flags, fl)
	return fl
}

// Bool declares a switch.
func (f *FlagSet) Bool(p *bool, name, short, help string) *Flag {
	fl := f.Add(name, short, "", help, func(s string) (err error) {
		*p, err = parseBool(s)
		return err
	})
	fl.optional = "true"
	if *p {
		fl.Default = "true"
	}
	return fl
}

// OptBool declares a switch whose absence differs from false.
func (f *FlagSet) OptBool(p **bool, name, short, help string) *Flag {
	fl := f.Add(name, short, "", help, func(s string) error {
		v, err := parseBool(s)
		*p = &v
		return err
	})
	fl.optional = "true"
	return fl
}

func parseBool(s string) (bool, error) {
	v, err := strconv.ParseBool(s)
	if err != nil {
		return false, fmt.Errorf("%q is neither true nor false", s)
	}
	return v, nil
}

// String declares a flag with a string; its value now is the default.
func (f *FlagSet) String(p *string, name, short, help string) *Flag {
	fl := f.Add(name, short, "string", help, func(s string) error { *p = s; return nil })
	fl.Default = *p
	return fl
}

// Strings declares a flag that can be given again and again.
func (f *FlagSet) Strings(p *[]string, name, short, help string) *Flag {
	return f.Add(name, short, "list", help, func(s string) error { *p = append(*p, s); return nil })
}

// Int declares a flag with a whole number.
func (f *FlagSet) Int(p *int, name, short, help string) *Flag {
	fl := f.Add(name, short, "int", help, func(s string) error {
		v, err := strconv.Atoi(s)
		if err != nil {
			return fmt.Errorf("%q is not a whole number", s)
		}
		*p = v
		return nil
	})
	if *p != 0 {
		fl.Default = strconv.Itoa(*p)
	}
	return fl
}

// Int64 declares a flag with a whole number.
func (f *FlagSet) Int64(p *int64, name, short, help string) *Flag {
	fl := f.Add(name, short, "int", help, func(s string) error {
		v, err := strconv.ParseInt(s, 10, 64)
		if err != nil {
			return fmt.Errorf("%q is not a whole number", s)
		}
		*p = v
		return nil
	})
	if *p != 0 {
		fl.Default = strconv.FormatInt(*p, 10)
	}
	return fl
}

// OptInt declares a number whose absence differs from 0.
func (f *FlagSet) OptInt(p **int, name, short, help string) *Flag {
	return f.Add(name, short, "int", help, func(s string) error {
		v, err := strconv.Atoi(s)
		if err != nil {
			return fmt.Errorf("%q is not a whole number", s)
		}
		*p = &v
		return nil
	})
}

// Duration declares a flag with a time such as 30s or 1m30s.
func (f *FlagSet) Duration(p *time.Duration, name, short, help string) *Flag {
	return f.Add(name, short, "duration", help, func(s string) error {
		v, err := time.ParseDuration(s)
		if err != nil {
			return fmt.Errorf("%q is not a duration: write 500ms, 30s, 1m30s", s)
		}
		*p = v
		return nil
	})
}

// Hide keeps a flag out of help.
func (fl *Flag) Hide() *Flag { fl.Hidden = true; return fl }

// Kind sets the word for the value in the help.
func (fl *Flag) Kind(typ string) *Flag { fl.Type = typ; return fl }

// Of says what the value is, for completion.
func (fl *Flag) Of(kind string) *Flag { fl.Complete = kind; return fl }

// Or gives the value that the flag has when it is written without one.
func (fl *Flag) Or(v string) *Flag { fl.optional = v; return fl }

// Changed reports whether the flag was given.
func (f *FlagSet) Changed(name string) bool {
	fl := f.long(name)
	return fl != nil && fl.Changed
}

// All gives the flags that are not hidden, by name.
func (f *FlagSet) All() []*Flag {
	out := slices.DeleteFunc(slices.Clone(f.flags), func(fl *Flag) bool { return fl.Hidden })
	slices.SortFunc(out, func(a, b *Flag) int { return strings.Compare(a.Name, b.Name) })
	return out
}

func (f *FlagSet) long(name string) *Flag {
	for _, fl := range f.flags {
		if fl.Name == name {
			return fl
		}
	}
	return nil
}

func (f *FlagSet) short(c string) *Flag {
	for _, fl := range f.flags {
		if fl.Short == c {
			return fl
		}
	}
	return nil
}

// Parse reads flags out of args and returns what is left. With interspersed,
// flags may follow arguments; else the first argument ends them. "--" ends them
// in any case.
func (f *FlagSet) Parse(args []string, interspersed bool) ([]string, error) {
	rest := []string(nil)
	for len(args) > 0 {
		a := args[0]
		if len(a) < 2 || a[0] != '-' {
			if !interspersed {
				return args, nil
			}
			rest = append(rest, a)
			args = args[1:]
			continue
		}
		args = args[1:]
		if a == "--" {
			return append(rest, args...), nil
		}
		var err error
		if a[1] == '-' {
			args, err = f.parseLong(a[2:], args)
		} else {
			args, err = f.parseShort(a[1:], args)
		}
		if err != nil {
			return nil, err
		}
	}
	return rest, nil
}

func (f *FlagSet) parseLong(a string, args []string) ([]string, error) {
	name, value, has := strings.Cut(a, "=")
	fl := f.long(name)
	if fl == nil {
		if name == "help" {
			return nil, ErrHelp
		}
		return nil, fmt.Errorf("unknown flag: --%s%s", name, f.suggest(name))
	}
	if !has {
		if fl.optional != "" {
			value = fl.optional
		} else if len(args) == 0 {
			return nil, fmt.Errorf("flag --%s needs a value", name)
		} else {
			value, args = args[0], args[1:]
		}
	}
	return args, fl.apply("--"+name, value)
}

func (f *FlagSet) parseShort(a string, args []string) ([]string, error) {
	for len(a) > 0 {
		c := a[:1]
		fl := f.short(c)
		if fl == nil {
			if c == "h" {
				return nil, ErrHelp
			}
			return nil, fmt.Errorf("unknown flag: -%s (in -%s)", c, a)
		}
		a = a[1:]
		var value string
		switch {
		case strings.HasPrefix(a, "="):
			value, a = a[1:], ""
		case fl.optional != "":
			value = fl.optional
		case a != "":
			value, a = a, ""
		case len(args) > 0:
			value, args = args[0], args[1:]
		default:
			return nil, fmt.Errorf("flag -%s needs a value", c)
		}
		if err := fl.apply("-"+c, value); err != nil {
			return nil, err
		}
	}
	return args, nil
}

func (fl *Flag) apply(as, value string) error {
	if err := fl.set(value); err != nil {
		return fmt.Errorf("cannot use %s: %w", as, err)
	}
	fl.Changed = true
	return nil
}

func (f *FlagSet) suggest(name string) string {
	best, dist := "", 3
	for _, fl := range f.flags {
		if d := distance(name, fl.Name); !fl.Hidden && d < dist {
			best, dist = fl.Name, d
		}
	}
	if best == "" {
		return ""
	}
	return "; did you mean --" + best + "?"
}

// usage lists the flags with their help.
func (f *FlagSet) usage() string {
	var b strings.Builder
	width := 0
	all := f.All()
	left := make([]string, len(all))
	for i, fl := range all {
		s := "      --" + fl.Name
		if fl.Short != "" {
			s = "  -" + fl.Short + ", --" + fl.Name
		}
		if fl.Type != "" {
			s += " " + fl.Type
		}
		left[i] = s
		width = max(width, len(s))
	}
	for i, fl := range all {
		help := fl.Help
		if fl.Default != "" {
			help += " (default " + fl.Default + ")"
		}
		pad := strings.Repeat(" ", width+3)
		fmt.Fprintf(&b, "%-*s   %s\n", width, left[i], strings.ReplaceAll(help, "\n", "\n"+pad))
	}
	return b.String()
}
