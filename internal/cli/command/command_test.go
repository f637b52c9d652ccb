package command

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"reflect"
	"strings"
	"testing"
	"time"
)

// probe is a tree whose commands record what they got.
func probe(got *string) *Command {
	var host string
	leaf := func(name string, c Command) *Command {
		var b, o bool
		var s string
		var l []string
		var d time.Duration
		var n int
		var ob *bool
		c.Name = name
		if c.Max == 0 {
			c.Max = -1
		}
		c.Flags = func(f *FlagSet) {
			f.Bool(&b, "all", "a", "Switch")
			f.Bool(&o, "other", "o", "Switch")
			f.String(&s, "str", "s", "String").Of("image")
			f.Strings(&l, "env", "e", "List")
			f.Duration(&d, "wait", "", "Duration")
			f.Int(&n, "num", "n", "Number")
			f.OptBool(&ob, "init", "", "Switch")
			f.String(&s, "hidden", "", "Hidden").Hide()
		}
		c.Run = func(_ context.Context, args []string) error {
			*got = fmt.Sprintf("%s host=%s a=%v o=%v s=%s e=%q w=%s n=%d args=%q", name, host, b, o, s, l, d, n, args)
			if ob != nil {
				*got += fmt.Sprintf(" init=%v", *ob)
			}
			return nil
		}
		return &c
	}
	return &Command{Name: "prog", Short: "A program",
		Flags: func(f *FlagSet) { f.String(&host, "host", "H", "Host") },
		Sub: func() []*Command {
			return []*Command{
				leaf("run", Command{Inner: true, Args: "IMAGE", Min: 1, Complete: []string{"image", ""}}),
				leaf("ps", Command{Aliases: []string{"list"}, Complete: []string{"container"}}),
				leaf("two", Command{Args: "A B", Min: 2, Max: 2}),
				leaf("raw", Command{Raw: true}),
				{Name: "images", Aliases: []string{"image"}, Default: "ls", DefaultArgs: true, Sub: func() []*Command {
					return []*Command{leaf("ls", Command{}), leaf("pull", Command{Min: 1})}
				}},
				{Name: "vols", Default: "ls", Sub: func() []*Command { return []*Command{leaf("ls", Command{})} }},
				leaf("secret", Command{Hidden: true}),
			}
		}}
}

func TestParse(t *testing.T) {
	for line, want := range map[string]string{
		"ps":                              `ps host= a=false o=false s= e=[] w=0s n=0 args=[]`,
		"list -a":                         `ps host= a=true o=false s= e=[] w=0s n=0 args=[]`,
		"--host h ps":                     `ps host=h a=false o=false s= e=[] w=0s n=0 args=[]`,
		"-H=h ps x -a y":                  `ps host=h a=true o=false s= e=[] w=0s n=0 args=["x" "y"]`,
		"ps -ao -s v":                     `ps host= a=true o=true s=v e=[] w=0s n=0 args=[]`,
		"ps -aosv":                        `ps host= a=true o=true s=v e=[] w=0s n=0 args=[]`,
		"ps -e A=1 --env=B=2 -eC":         `ps host= a=false o=false s= e=["A=1" "B=2" "C"] w=0s n=0 args=[]`,
		"ps --all=false -a --wait 1m -n7": `ps host= a=true o=false s= e=[] w=1m0s n=7 args=[]`,
		"ps -a=false":                     `ps host= a=false o=false s= e=[] w=0s n=0 args=[]`,
		"ps --str=":                       `ps host= a=false o=false s= e=[] w=0s n=0 args=[]`,
		"ps -- -a --str":                  `ps host= a=false o=false s= e=[] w=0s n=0 args=["-a" "--str"]`,
		"ps -":                            `ps host= a=false o=false s= e=[] w=0s n=0 args=["-"]`,
		"ps --init":                       `ps host= a=false o=false s= e=[] w=0s n=0 args=[] init=true`,
		"ps --init=false":                 `ps host= a=false o=false s= e=[] w=0s n=0 args=[] init=false`,
		"run -a img -o --str x":           `run host= a=true o=false s= e=[] w=0s n=0 args=["img" "-o" "--str" "x"]`,
		"run img -- x":                    `run host= a=false o=false s= e=[] w=0s n=0 args=["img" "--" "x"]`,
		"run -- img -a":                   `run host= a=false o=false s= e=[] w=0s n=0 args=["img" "-a"]`,
		"raw --anything -x":               `raw host= a=false o=false s= e=[] w=0s n=0 args=["--anything" "-x"]`,
		"images":                          `ls host= a=false o=false s= e=[] w=0s n=0 args=[]`,
		"images -a":                       `ls host= a=true o=false s= e=[] w=0s n=0 args=[]`,
		"images alpine":                   `ls host= a=false o=false s= e=[] w=0s n=0 args=["alpine"]`,
		"image pull x":                    `pull host= a=false o=false s= e=[] w=0s n=0 args=["x"]`,
		"vols":                            `ls host= a=false o=false s= e=[] w=0s n=0 args=[]`,
	} {
		var got string
		inv, err := Parse(probe(&got), strings.Fields(line))
		if err != nil {
			t.Errorf("%s: %v", line, err)
			continue
		}
		inv.Command.Run(context.Background(), inv.Args)
		if got != want {
			t.Errorf("%s:\n got %s\nwant %s", line, got, want)
		}
	}
}

func TestParseErrors(t *testing.T) {
	for line, want := range map[string]string{
		"ps --nope":      "unknown flag: --nope",
		"ps --al":        "did you mean --all?",
		"ps -x":          "unknown flag: -x",
		"ps --str":       "needs a value",
		"ps -s":          "needs a value",
		"ps --num x":     "not a whole number",
		"ps --all=maybe": "neither true nor false",
		"ps --wait 5":    "not a duration",
		"run":            "at least 1 argument",
		"two a":          "needs 2 arguments",
		"two a b c":      "at most 2 arguments",
		"image pull":     "at least 1 argument",
		"--nope ps":      "unknown flag: --nope",
		"pss":            "did you mean 'prog ps'?",
		"imgae":          "did you mean 'prog image'?",
		"vols zzz":       `"zzz" is not a command of prog vols`,
		"zzzzzz":         `"zzzzzz" is not a command of prog`,
	} {
		var got string
		_, err := Parse(probe(&got), strings.Fields(line))
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", line, err, want)
			continue
		}
		var ue *UsageError
		var ke *UnknownError
		if !errors.As(err, &ue) && !errors.As(err, &ke) {
			t.Errorf("%s: %T", line, err)
		}
	}
}

func TestHelpAsked(t *testing.T) {
	for _, line := range []string{"", "--help", "-h", "ps --help", "ps -h", "run -a --help", "images --help", "vols -h", "two --help"} {
		var got string
		inv, err := Parse(probe(&got), strings.Fields(line))
		if err != nil || !inv.Help {
			t.Errorf("%q: %v %+v", line, err, inv)
		}
	}
	var got string
	if inv, err := Parse(probe(&got), []string{"run", "img", "--help"}); err != nil || inv.Help {
		t.Errorf("--help of the container's command was taken: %v", err)
	}
}

func TestComplete(t *testing.T) {
	words := func(c Completion) string {
		var w []string
		for _, x := range c.Candidates {
			w = append(w, x.Word)
		}
		return strings.Join(w, " ")
	}
	for line, want := range map[string][3]string{ // candidates, kind, before
		"":                 {"run ps two raw images vols", "plugin", ""},
		"p":                {"ps", "plugin", ""},
		"images ":          {"ls pull", "", ""},
		"image p":          {"pull", "", ""},
		"ps --":            {"--all --env --init --num --other --str --wait", "", ""},
		"ps --s":           {"--str", "", ""},
		"ps --str ":        {"", "image", ""},
		"ps --str=al":      {"", "image", "--str="},
		"ps -s ":           {"", "image", ""},
		"ps -as ":          {"", "image", ""},
		"ps ":              {"", "container", ""},
		"ps a ":            {"", "container", ""},
		"run ":             {"", "image", ""},
		"run -a ":          {"", "image", ""},
		"run img ":         {"", "", ""},
		"run img --":       {"", "", ""},
		"--host x ps --al": {"--all", "", ""},
		"nope ":            {"", "", ""},
		"ps -- --al":       {"", "container", ""},
	} {
		var got string
		c := Complete(probe(&got), strings.Split(line, " "))
		if g := [3]string{words(c), c.Kind, c.Before}; g != want {
			t.Errorf("%q: %q, want %q", line, g, want)
		}
	}
}

var update = flag.Bool("update", false, "write golden files")

func TestHelpAndMarkdown(t *testing.T) {
	var got string
	root := probe(&got)
	var b bytes.Buffer
	WriteHelp(&b, root, "prog", true, Section{Title: "Plugins", Items: [][2]string{{"x", "/bin/x"}}})
	WriteHelp(&b, root.Find("ps"), "prog ps", false)
	WriteMarkdown(&b, root.Find("images"), "prog images")
	want, _ := os.ReadFile("testdata/help.golden")
	if *update {
		os.MkdirAll("testdata", 0o755)
		os.WriteFile("testdata/help.golden", b.Bytes(), 0o644)
	} else if !reflect.DeepEqual(b.Bytes(), want) {
		t.Errorf("got\n%s\nwant\n%s", b.Bytes(), want)
	}
}

func FuzzParse(f *testing.F) {
	f.Add("ps -ao --str=x -- y")
	f.Fuzz(func(t *testing.T, line string) {
		var got string
		Parse(probe(&got), strings.Split(line, " "))
		Complete(probe(&got), strings.Split(line, " "))
	})
}
