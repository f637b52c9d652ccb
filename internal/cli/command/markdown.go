package command

import (
	"fmt"
	"io"
	"strings"
)

// WriteMarkdown writes a reference page of a command and everything below it.
func WriteMarkdown(w io.Writer, c *Command, path string) error {
	var b strings.Builder
	Walk(c, path, func(c *Command, path string) {
		level := strings.Count(path, " ")
		fmt.Fprintf(&b, "%s %s\n\n", strings.Repeat("#", min(level, 3)), path)
		if c.Sub != nil {
			fmt.Fprintf(&b, "%s.\n\n", strings.TrimSuffix(c.Short, "."))
			if len(c.Aliases) > 0 {
				fmt.Fprintf(&b, "Also written: %s\n\n", code(c.Aliases))
			}
			b.WriteString("| command | what it does |\n|---|---|\n")
			for _, s := range c.Sub() {
				if !s.Hidden {
					fmt.Fprintf(&b, "| [`%s`](#%s) | %s |\n", s.Name, strings.ReplaceAll(path+" "+s.Name, " ", "-"), cell(s.Short))
				}
			}
			b.WriteString("\n")
			if c.Default != "" {
				fmt.Fprintf(&b, "`%s` alone is `%s %s`.\n\n", path, path, c.Default)
			}
			return
		}
		if c.Long != "" {
			fmt.Fprintf(&b, "%s\n\n", c.Long)
		} else {
			fmt.Fprintf(&b, "%s.\n\n", strings.TrimSuffix(c.Short, "."))
		}
		usage := path
		if hasFlags(c) {
			usage += " [OPTIONS]"
		}
		if c.Raw {
			usage += " [ARG...]"
		} else if c.Args != "" {
			usage += " " + c.Args
		}
		fmt.Fprintf(&b, "```\n%s\n```\n\n", usage)
		if len(c.Aliases) > 0 {
			fmt.Fprintf(&b, "Also written: %s\n\n", code(c.Aliases))
		}
		writeFlagTable(&b, c)
		if c.Example != "" {
			fmt.Fprintf(&b, "```\n%s\n```\n\n", strings.TrimSpace(c.Example))
		}
	})
	_, err := io.WriteString(w, strings.TrimRight(b.String(), "\n")+"\n")
	return err
}

func writeFlagTable(b *strings.Builder, c *Command) {
	if c.Flags == nil {
		return
	}
	fs := new(FlagSet)
	c.Flags(fs)
	all := fs.All()
	if len(all) == 0 {
		return
	}
	b.WriteString("| option | value | what it does |\n|---|---|---|\n")
	for _, fl := range all {
		name := "`--" + fl.Name + "`"
		if fl.Short != "" {
			name = "`-" + fl.Short + "`, " + name
		}
		help := cell(fl.Help)
		if fl.Default != "" {
			help += " (default " + cell(fl.Default) + ")"
		}
		fmt.Fprintf(b, "| %s | %s | %s |\n", name, fl.Type, help)
	}
	b.WriteString("\n")
}

// WriteFlags writes a table of a command's own flags.
func WriteFlags(w io.Writer, c *Command) error {
	var b strings.Builder
	writeFlagTable(&b, c)
	_, err := io.WriteString(w, b.String())
	return err
}

func cell(s string) string {
	return strings.ReplaceAll(strings.ReplaceAll(s, "\n", " "), "|", "\\|")
}

func code(names []string) string {
	return "`" + strings.Join(names, "`, `") + "`"
}
