package ociruntime

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"runtime"
	"strings"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// command is one word of the command line.
type command struct {
	name, args, usage string
	min, max          int // arguments, max -1 for any number
	// verbatim: what follows the first argument is not ours to parse.
	verbatim bool
	flags    func(*flags)
	run      func(*app, *flags) error
}

func commands() []command {
	const id = "<container-id>"
	return []command{
		{name: "checkpoint", args: id, usage: "checkpoint a running container", min: 1, max: 1, flags: checkpointFlags, run: (*app).checkpoint},
		{name: "create", args: id, usage: "create a container", min: 1, max: 1, flags: createFlags, run: (*app).create},
		{name: "delete", args: id, usage: "delete any resources held by the container often used with detached container", min: 1, max: 1, flags: deleteFlags, run: (*app).delete},
		{name: "events", args: id, usage: "display container events such as OOM notifications, cpu, memory, and IO usage statistics", min: 1, max: 1, flags: eventsFlags, run: (*app).events},
		{name: "exec", args: id + " <command> [command options]  || -p process.json " + id, usage: "execute new process inside the container", min: 1, max: -1, verbatim: true, flags: execFlags, run: (*app).exec},
		{name: "kill", args: id + " [signal]", usage: "kill sends the specified signal (default: SIGTERM) to the container's init process", min: 1, max: 2, flags: killFlags, run: (*app).kill},
		{name: "list", usage: "lists containers started with the given root", flags: listFlags, run: (*app).list},
		{name: "pause", args: id, usage: "pause suspends all processes inside the container", min: 1, max: 1, run: (*app).pause},
		{name: "ps", args: id + " [ps options]", usage: "ps displays the processes running inside a container", min: 1, max: -1, verbatim: true, flags: psFlags, run: (*app).ps},
		{name: "restore", args: id, usage: "restore a container from a previous checkpoint", min: 1, max: 1, flags: restoreFlags, run: (*app).restore},
		{name: "resume", args: id, usage: "resumes all processes that have been previously paused", min: 1, max: 1, run: (*app).resume},
		{name: "run", args: id, usage: "create and run a container", min: 1, max: 1, flags: runFlags, run: (*app).runContainer},
		{name: "spec", usage: "create a new specification file", flags: specFlags, run: (*app).spec},
		{name: "start", args: id, usage: "executes the user defined process in a created container", min: 1, max: 1, run: (*app).start},
		{name: "state", args: id, usage: "output the state of a container", min: 1, max: 1, run: (*app).state},
		{name: "update", args: id, usage: "update container resource constraints", min: 1, max: 1, flags: updateFlags, run: (*app).update},
		{name: "features", usage: "show the enabled features", run: (*app).features},
	}
}

// flags are the flags of one command and the arguments that follow them.
type flags struct {
	set  *flag.FlagSet
	args []string
	help bool
	list []string // names with their aliases, for the help
	str  map[string]*string
	num  map[string]*int
	flag map[string]*bool
	dur  map[string]*time.Duration
	many map[string]*list
}

type list []string

func (l *list) String() string     { return strings.Join(*l, ",") }
func (l *list) Set(v string) error { *l = append(*l, v); return nil }

func newFlags(name string) *flags {
	f := &flags{set: flag.NewFlagSet(name, flag.ContinueOnError), str: map[string]*string{}, num: map[string]*int{},
		flag: map[string]*bool{}, dur: map[string]*time.Duration{}, many: map[string]*list{}}
	f.set.SetOutput(io.Discard)
	f.boolean("help,h", "show help")
	return f
}

// each calls add for a name and its aliases: "bundle,b".
func (f *flags) each(names, usage, kind string, add func(name string)) string {
	all := strings.Split(names, ",")
	for _, n := range all {
		add(n)
	}
	if usage == "" {
		return all[0] // an obsolete one, accepted and not shown
	}
	for i, n := range all {
		if len(n) == 1 {
			all[i] = "-" + n
		} else {
			all[i] = "--" + n
		}
	}
	f.list = append(f.list, fmt.Sprintf("%-28s %s", strings.Join(all, ", ")+kind, usage))
	return strings.TrimPrefix(all[0], "--")
}

func (f *flags) text(names, value, usage string) {
	v := new(string)
	f.str[f.each(names, usage, " value", func(n string) { f.set.StringVar(v, n, value, usage) })] = v
}
func (f *flags) number(names string, usage string) {
	v := new(int)
	f.num[f.each(names, usage, " value", func(n string) { f.set.IntVar(v, n, 0, usage) })] = v
}
func (f *flags) boolean(names, usage string) {
	v := new(bool)
	f.flag[f.each(names, usage, "", func(n string) { f.set.BoolVar(v, n, false, usage) })] = v
}
func (f *flags) duration(names string, value time.Duration, usage string) {
	v := new(time.Duration)
	f.dur[f.each(names, usage, " value", func(n string) { f.set.DurationVar(v, n, value, usage) })] = v
}
func (f *flags) strings(names, usage string) {
	v := new(list)
	f.many[f.each(names, usage, " value", func(n string) { f.set.Var(v, n, usage) })] = v
}

func (f *flags) isSet(name string) (set bool) {
	f.set.Visit(func(x *flag.Flag) { set = set || x.Name == name })
	return set
}

// parse reads flags and arguments in any order, as callers of runc write them,
// up to "--"; with verbatim everything behind the first argument is left alone.
func (f *flags) parse(args []string, verbatim bool) error {
	for {
		if err := f.set.Parse(args); err != nil {
			return err
		}
		rest := f.set.Args()
		ended := len(args) > len(rest) && args[len(args)-len(rest)-1] == "--"
		if len(rest) == 0 || verbatim || ended {
			f.args = append(f.args, rest...)
			break
		}
		f.args = append(f.args, rest[0])
		args = rest[1:]
	}
	f.help = *f.flag["help"]
	return nil
}

func globalFlags(name string) *flags {
	g := newFlags(name)
	root, _ := defaultRoot()
	g.boolean("debug", "enable debug logging")
	g.text("log", "", "set the log file to write logs to (default is '/dev/stderr')")
	g.text("log-format", "text", "set the log format ('text' (default), or 'json')")
	g.text("root", root, "root directory for storage of container state (this should be located in tmpfs)")
	g.boolean("systemd-cgroup", "enable systemd cgroup support, expects cgroupsPath to be of form \"slice:prefix:name\"")
	g.text("rootless", "auto", "ignore cgroup permission errors ('true', 'false', or 'auto')")
	g.text("criu", "", "") // obsolete; criu is looked up in PATH
	g.boolean("version,v", "print the version")
	return g
}

func (a *app) run(args []string) error {
	g := globalFlags(a.name)
	if err := g.parse(args, true); err != nil {
		fmt.Fprintf(a.stdout, "Incorrect Usage. %v\n\n", err)
		a.help(g)
		return err
	}
	if *g.flag["version"] {
		a.version()
		return nil
	}
	if len(g.args) == 0 || g.help || g.args[0] == "help" || g.args[0] == "h" {
		a.help(g)
		return nil
	}
	name := g.args[0]
	for _, c := range commands() {
		if c.name != name {
			continue
		}
		if err := a.setRoot(*g.str["root"], g.isSet("root")); err != nil {
			return err
		}
		if err := a.log.configure(*g.str["log"], *g.str["log-format"], *g.flag["debug"]); err != nil {
			return err
		}
		a.systemd, a.rootless = *g.flag["systemd-cgroup"], *g.str["rootless"]
		return a.call(&c, g.args[1:])
	}
	//lint:ignore ST1005 as callers know it
	return exitCode{3, fmt.Errorf("No help topic for '%s'", name)}
}

func (a *app) call(c *command, args []string) error {
	f := newFlags(c.name)
	if c.flags != nil {
		c.flags(f)
	}
	err := f.parse(args, c.verbatim)
	if err == nil && f.help {
		a.commandHelp(c, f)
		return nil
	}
	if err == nil {
		err = c.count(len(f.args))
		if err != nil {
			err = fmt.Errorf("%s: %q %w", a.name, c.name, err)
		}
	}
	if err != nil {
		fmt.Fprintf(a.stdout, "Incorrect Usage.\n\n")
		a.commandHelp(c, f)
		return err
	}
	return c.run(a, f)
}

func (c *command) count(n int) error {
	switch {
	case c.min == c.max && n != c.min:
		return fmt.Errorf("requires exactly %d argument(s)", c.min)
	case n < c.min:
		return fmt.Errorf("requires a minimum of %d argument(s)", c.min)
	case c.max >= 0 && n > c.max:
		return fmt.Errorf("requires a maximum of %d argument(s)", c.max)
	}
	return nil
}

func (a *app) help(g *flags) {
	fmt.Fprintf(a.stdout, "NAME:\n   %s - Open Container Initiative runtime\n\n", a.name)
	fmt.Fprintf(a.stdout, "USAGE:\n   %s [global options] command [command options] [arguments...]\n\nCOMMANDS:\n", a.name)
	for _, c := range commands() {
		fmt.Fprintf(a.stdout, "   %-11s %s\n", c.name, c.usage)
	}
	fmt.Fprintf(a.stdout, "\nGLOBAL OPTIONS:\n   %s\n", strings.Join(g.list, "\n   "))
}

func (a *app) commandHelp(c *command, f *flags) {
	fmt.Fprintf(a.stdout, "NAME:\n   %s %s - %s\n\nUSAGE:\n   %s %s [command options] %s\n\nOPTIONS:\n   %s\n",
		a.name, c.name, c.usage, a.name, c.name, c.args, strings.Join(f.list, "\n   "))
}

// version prints what engines take apart: a name, a version of three numbers, and
// the version of the spec.
func (a *app) version() {
	fmt.Fprintf(a.stdout, "%s version %s\ncommit: %s\nspec: %s\ngo: %s\n", a.name, numbered(a.release), a.release, specs.Version, runtime.Version())
}

func numbered(v string) string {
	v = strings.TrimPrefix(v, "v")
	if n, _, ok := strings.Cut(v, "."); ok && n != "" && strings.Trim(n, "0123456789") == "" {
		return v
	}
	return "0.0.0-" + v
}

var errFormat = errors.New("invalid format option")
