// Package slots knows the two places for systems on a disk, a and b, and how a
// boot chooses one: the boot loader reads a small block of variables (GRUB's
// environment block), tries a new slot a number of times, counting down before each
// start, and falls back to the one known to be good. A system that came up well confirms
// itself. The builder of images and who installs and upgrades import it.
package slots

import (
	"bytes"
	"fmt"
	"strconv"
	"strings"

	"github.com/cloudos-io/cloudos/internal/fault"
)

// Size of the block, in bytes. The boot loader writes it in place.
const Size = 1024

// Tries is how often a new slot is started before it is given up.
const Tries = 3

const head = "# GRUB Environment Block\n"

// State is what the block says.
type State struct {
	// Good is the slot that came up well last: a or b.
	Good string
	// Try is a slot that has not come up yet; empty is none. Left counts the
	// starts that it still has.
	Try  string
	Left int
}

func isSlot(s string) bool { return s == "a" || s == "b" }

// Parse reads a block. One that cannot be read is an error: a boot loader would
// start slot a.
func Parse(b []byte) (State, error) {
	text, ok := strings.CutPrefix(string(b), head)
	if len(b) != Size || !ok {
		return State{}, fault.New(fault.Invalid, "this is no block of a boot loader's variables")
	}
	s := State{Good: "a"}
	for _, line := range strings.Split(strings.TrimRight(text, "#"), "\n") {
		k, v, ok := strings.Cut(line, "=")
		if !ok {
			continue
		}
		switch k {
		case "good":
			s.Good = v
		case "try":
			s.Try = v
		case "left":
			n, err := strconv.Atoi(v)
			if err != nil {
				return State{}, fault.New(fault.Invalid, "left=%q is no number", v)
			}
			s.Left = n
		}
	}
	return s, s.check()
}

func (s State) check() error {
	if !isSlot(s.Good) || s.Try != "" && !isSlot(s.Try) || s.Left < 0 || s.Left > Tries {
		return fault.New(fault.Invalid, "the boot loader's variables make no sense: good=%q try=%q left=%d", s.Good, s.Try, s.Left)
	}
	return nil
}

// Block is the state as the boot loader reads it.
func (s State) Block() ([]byte, error) {
	if err := s.check(); err != nil {
		return nil, err
	}
	b := bytes.NewBufferString(head)
	fmt.Fprintf(b, "good=%s\ntry=%s\nleft=%d\n", s.Good, s.Try, s.Left)
	return append(b.Bytes(), bytes.Repeat([]byte{'#'}, Size-b.Len())...), nil
}

// Other is the slot that an upgrade is written to.
func Other(slot string) string {
	if slot == "a" {
		return "b"
	}
	return "a"
}

// Start has the next boots try a slot.
func (s State) Start(slot string) State { return State{Good: s.Good, Try: slot, Left: Tries} }

// StartOnce has the firmware try a slot, which starts it once and then the good one.
func (s State) StartOnce(slot string) State { return State{Good: s.Good, Try: slot, Left: 1} }

// Confirm notes that the running slot came up well.
func (s State) Confirm(running string) State { return State{Good: running} }

// GiveUp notes that the slot which is tried did not come up: the next start is the good one's.
func (s State) GiveUp() State { return State{Good: s.Good, Try: s.Try} }

// Next is the slot that the next boot starts.
func (s State) Next() string {
	if s.Try != "" && s.Left > 0 {
		return s.Try
	}
	return s.Good
}

// Fallen reports whether a slot was tried and given up.
func (s State) Fallen() bool { return s.Try != "" && s.Left == 0 }

// Partition is the label of a slot's partition, Folder the folder on the boot
// partition with its kernel.
func Partition(slot string) string { return "cloudos-" + slot }

// Folder is where a slot's kernel is on the boot partition.
func Folder(slot string) string { return "cloudos/" + slot }

// SealedFile is the name of the envelope of a slot's system (package release), in the slot's
// folder. It is written last and removed first: a slot without it has no whole system.
const SealedFile = "release.jsn"

// UnifiedFile is the name of the unified image in a slot's folder, on a disk that its owner signed: the firmware
// starts it, with no boot loader in between. The state's block is there, too, and is the first process' alone.
const UnifiedFile = "system.efi"

// BlockFile is the block's path on the boot partition.
const BlockFile = "cloudos/grubenv"

// Script is the boot loader's configuration. What cannot be started starts the
// machine again, so that a slot that is tried runs out of tries. A slot's own folder has boot.cfg
// with its kernel's command line, so that an upgrade changes that alone. The block is
// read without being measured (--skip-sig): PCR 9 stays what keys are sealed to.
func Script() string {
	return `set timeout=0
set good=a
set try=
set left=0
if [ -f ($root)/cloudos/grubenv ]; then load_env --skip-sig -f ($root)/cloudos/grubenv good try left; fi
set slot=$good
if [ -n "$try" ]; then
  if [ "$left" = 3 ]; then set left=2; set slot=$try
  elif [ "$left" = 2 ]; then set left=1; set slot=$try
  elif [ "$left" = 1 ]; then set left=0; set slot=$try
  fi
  save_env -f ($root)/cloudos/grubenv good try left
fi
if [ "$slot" != a -a "$slot" != b ]; then set slot=a; fi
source ($root)/cloudos/$slot/boot.cfg
boot
echo "The system in slot $slot cannot be started."
sleep 5
reboot
`
}
