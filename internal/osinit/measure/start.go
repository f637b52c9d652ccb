package measure

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/pattern"
	"github.com/cloudos-io/cloudos/internal/slots"
)

// Registers of which a start by GRUB changes something from system to system.
const (
	programs = 4
	commands = 8
	files    = 9
)

// System is what GRUB starts of a slot.
type System struct {
	Slot string
	// Config is its boot.cfg.
	Config []byte
	// Kernel and Initrd are the files' digests, Image the kernel's as a program of the firmware's (Authenticode).
	Kernel, Initrd, Image [sha256.Size]byte
}

// Start is a start of this machine that is understood.
type Start struct {
	events []event
	// root is GRUB's name of the boot partition, with parentheses; esp its identity.
	root, esp string
	// tail is where the commands begin that depend on the state, as an index of events.
	tail  int
	image [sha256.Size]byte
}

const (
	command     = "grub_cmd: "
	commandLine = "kernel_cmdline: "
)

var loads = pattern.New(`^grub_cmd: load_env --skip-sig -f (\([a-z0-9]+,gpt[0-9]+\))/cloudos/grubenv good try left$`)

func unknown(format string, args ...any) error {
	return fault.New(fault.Unsupported, "this start was not measured as expected: "+format, args...)
}

// Understand reads the log of the machine's start, which was that of the system now, and of which the registers' values
// are known. What is not exactly as this package would have told it beforehand is an error.
func Understand(log []byte, now System, esp string, pcrs []int, values [][]byte) (*Start, error) {
	events, err := parse(log)
	if err != nil {
		return nil, err
	}
	s := &Start{events: events, esp: esp, tail: -1, image: now.Image}
	if len(pcrs) != len(values) {
		return nil, unknown("the registers and their values do not belong together")
	}
	for i, n := range pcrs {
		if !bytes.Equal(register(events, n), values[i]) {
			return nil, unknown("the log does not have all of register %d", n)
		}
	}
	for i, e := range events {
		if e.pcr != commands {
			continue
		}
		text, ok := strings.CutPrefix(e.text, command)
		if !ok {
			text, ok = strings.CutPrefix(e.text, commandLine)
		}
		if !ok || sha256.Sum256([]byte(text)) != e.digest {
			return nil, unknown("register 8 has something else than commands (%.80q)", e.text)
		}
		if m := loads.FindStringSubmatch(e.text); m != nil {
			if s.tail >= 0 {
				return nil, unknown("the state was read twice")
			}
			s.root, s.tail = m[1], i+1
		}
	}
	if s.tail < 0 {
		return nil, unknown("no state was read")
	}
	if err := s.sameFiles(now); err != nil {
		return nil, err
	}
	if err := s.samePrograms(); err != nil {
		return nil, err
	}
	return s, s.sameCommands(now)
}

// sameFiles expects GRUB's configuration, and then the system's files and nothing more.
func (s *Start) sameFiles(now System) error {
	var read []event
	for _, e := range s.events {
		if e.pcr == files {
			read = append(read, e)
		}
	}
	want := s.files(now)
	if len(read) <= len(want) {
		return unknown("too few files were read")
	}
	n := len(read) - len(want)
	if read[n-1].digest != sha256.Sum256([]byte(slots.Script())) {
		return unknown("the boot loader's configuration is another one (%.80q)", read[n-1].text)
	}
	for i, w := range want {
		if read[n+i].text != w.text || read[n+i].digest != w.digest {
			return unknown("%.80q was read where %s was expected", read[n+i].text, w.text)
		}
	}
	return nil
}

func (s *Start) files(sys System) []event {
	dir := s.root + "/" + slots.Folder(sys.Slot) + "/"
	return []event{{files, sha256.Sum256(sys.Config), dir + "boot.cfg"}, {files, sys.Kernel, dir + "kernel"}, {files, sys.Initrd, dir + "initrd"}}
}

// samePrograms expects the kernel as the last program.
func (s *Start) samePrograms() error {
	var last *event
	for i, e := range s.events {
		if e.pcr == programs {
			last = &s.events[i]
		}
	}
	if last == nil || last.digest != s.image {
		return unknown("the last program is not the kernel")
	}
	return nil
}

// sameCommands expects the commands of one of the states in which the boot loader starts the system.
func (s *Start) sameCommands(now System) error {
	var done []string
	for _, e := range s.events[s.tail:] {
		if e.pcr == commands {
			done = append(done, e.text)
		}
	}
	other := slots.Other(now.Slot)
	states := []slots.State{{Good: now.Slot}, {Good: other, Try: now.Slot}, {Good: now.Slot, Try: other}}
	for left := 1; left <= slots.Tries; left++ {
		states = append(states, slots.State{Good: other, Try: now.Slot, Left: left})
	}
	for _, state := range states {
		want, err := s.commands(state, now)
		if err != nil {
			return err
		}
		if slices.Equal(done, want) {
			return nil
		}
	}
	return unknown("the boot loader's commands are others")
}

// commands are those that GRUB carries out in a state (slots.Script), as events say them.
func (s *Start) commands(state slots.State, sys System) ([]string, error) {
	var out []string
	do := func(words ...string) { out = append(out, command+strings.Join(words, " ")) }
	slot := state.Good
	do("set", "slot="+slot)
	do("[", "-n", state.Try, "]")
	if state.Try != "" {
		for left := slots.Tries; left > 0; left-- {
			do("[", strconv.Itoa(state.Left), "=", strconv.Itoa(left), "]")
			if state.Left == left {
				slot = state.Try
				do("set", "left="+strconv.Itoa(left-1))
				do("set", "slot="+slot)
				break
			}
		}
		do("save_env", "-f", s.root+"/cloudos/grubenv", "good", "try", "left")
	}
	do("[", slot, "!=", "a", "-a", slot, "!=", "b", "]")
	do("source", s.root+"/"+slots.Folder(slot)+"/boot.cfg")
	if slot != sys.Slot {
		return nil, nil // that system is not started so
	}
	started, err := s.config(sys)
	if err != nil {
		return nil, err
	}
	out = append(out, started...)
	do("boot")
	return out, nil
}

// plain are the characters that mean nothing to GRUB.
var plain = pattern.New(`^[A-Za-z0-9 _.,:=/()@%+-]*$`)

// config is what GRUB does of a system's boot.cfg. One with more than starting a kernel in it is not understood.
func (s *Start) config(sys System) ([]string, error) {
	var out []string
	for _, line := range strings.Split(strings.TrimSuffix(string(sys.Config), "\n"), "\n") {
		line = strings.ReplaceAll(line, "$root", strings.Trim(s.root, "()"))
		if strings.Contains(line, "$esp") && s.esp == "" {
			return nil, unknown("the boot loader did not say which disk it started")
		}
		line = strings.ReplaceAll(line, "$esp", s.esp)
		name, args, _ := strings.Cut(line, " ")
		if !plain.MatchString(line) || strings.Contains(line, "  ") || strings.HasSuffix(line, " ") {
			return nil, unknown("%.80q is not understood", line)
		}
		out = append(out, command+line)
		switch {
		case name == "linux":
			out = append(out, commandLine+args)
		case name == "initrd", line == "set esp=", strings.HasPrefix(line, "probe --set=esp --part-uuid "):
		default:
			return nil, unknown("%.80q is not understood", line)
		}
	}
	return out, nil
}

// Registers are the values that registers will have when the boot loader, with everything else as at this start, starts
// a system in a state.
func (s *Start) Registers(state slots.State, sys System, pcrs []int) ([][]byte, error) {
	cmds, err := s.commands(state, sys)
	if err == nil && cmds == nil {
		err = fault.New(fault.Internal, "slot %s is not started in the state %+v", sys.Slot, state)
	}
	if err != nil {
		return nil, err
	}
	var events []event
	keep := 0 // of the files, all but the last
	for _, e := range s.events {
		if e.pcr == files {
			keep++
		}
	}
	read := s.files(sys)
	keep -= len(read)
	for i, e := range s.events {
		switch {
		case e.pcr == commands && i >= s.tail:
			continue
		case e.pcr == files:
			if keep--; keep < 0 {
				continue
			}
		case e.pcr == programs && e.digest == s.image:
			e.digest = sys.Image
		}
		events = append(events, e)
	}
	for _, c := range cmds {
		_, text, _ := strings.Cut(c, ": ")
		events = append(events, event{pcr: commands, digest: sha256.Sum256([]byte(text))})
	}
	events = append(events, read...)
	var out [][]byte
	for _, n := range pcrs {
		out = append(out, register(events, n))
	}
	return out, nil
}

// Known are the registers that can be told beforehand: those that a start by Debian's boot loaders is measured into, and those
// that are the same whichever system is started.
func Known(pcrs []int) error {
	for _, n := range pcrs {
		if !slices.Contains([]int{0, 1, 2, 3, 4, 6, 7, 8, 9}, n) {
			return fmt.Errorf("what register %d will have cannot be told", n)
		}
	}
	return nil
}
