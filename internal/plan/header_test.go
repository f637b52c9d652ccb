package plan

import (
	"bytes"
	"flag"
	"fmt"
	"os"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "rewrite shim/op.h and the golden files")

// header renders shim/op.h from the table in op.go.
func header() []byte {
	var b bytes.Buffer
	b.WriteString("/* Generated from internal/plan/op.go by its test with -update. Do not edit. */\n")
	b.WriteString("#ifndef SERVIN_OP_H\n#define SERVIN_OP_H\n\n")
	fmt.Fprintf(&b, "#define PLAN_MAGIC \"%s\"\n#define PLAN_VERSION %d\n", magic, version)
	fmt.Fprintf(&b, "#define PLAN_CONTINUE %d\n#define PLAN_MAX_OPS %d\n#define PLAN_MAX %d\n#define NO_SLOT %#x\n\n", flagContinue, maxOps, maxPlan, NoSlot)
	b.WriteString("/* A payload follows the operation's name (s). h, i, q: 16, 32, 64 bits; s: u16 length, bytes, NUL;\n" +
		"   S: u32 length, bytes, NUL; b: u32 length, bytes; [..]: u16 count, then the types repeated. */\nenum op {\n")
	for _, l := range layouts() {
		line := fmt.Sprintf("\tOP_%s = %d,", l.name, l.kind)
		note := strings.TrimSpace(l.fields)
		if l.doc != "" {
			note = strings.TrimPrefix(note+"; "+l.doc, "; ")
		}
		if note != "" {
			line = fmt.Sprintf("%-24s /* %s */", line, note)
		}
		b.WriteString(line + "\n")
	}
	b.WriteString("};\n\n")
	for _, f := range []struct {
		name string
		v    uint16
	}{
		{"MOUNT_NO_SYMLINKS", FlagNoSymlinks}, {"MOUNT_ON_PROC", FlagOnProc}, {"MOUNT_IS_PROC", FlagIsProc},
		{"MOUNT_COPY_UP", FlagCopyUp}, {"MOUNT_KEEP_MODE", FlagKeepMode}, {"ATTR_RECURSIVE", FlagRecursive}, {"SECCOMP_NOTIFY", FlagNotify},
		{"CREDS_HAS_CAPS", FlagHasCaps}, {"CREDS_KEEP_GROUPS", FlagKeepGroups}, {"CWD_CREATE", FlagCreate},
		{"EXEC_INIT", FlagInit}, {"HOOK_HOME", FlagHookHome}, {"ROOT_SHARED", FlagShared}, {"PIVOT_CHROOT", FlagChroot},
		{"SOURCE_ATTR_TREE", FlagAttrTree}, {"SOURCE_PROP_TREE", FlagPropTree},
		{"CONSOLE_DEV", FlagDevConsole}, {"CONSOLE_PLAIN", FlagPlainOutput}, {"OP_OPTIONAL", FlagOptional},
	} {
		fmt.Fprintf(&b, "#define F_%s %#x\n", f.name, f.v)
	}
	b.WriteString("\n#endif\n")
	return b.Bytes()
}

func TestHeader(t *testing.T) {
	const path = "../../shim/op.h"
	want := header()
	if *update {
		if err := os.WriteFile(path, want, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	got, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Fatal("shim/op.h differs from op.go; run go test ./internal/plan -run TestHeader -update")
	}
	seen := map[Kind]bool{}
	for _, l := range layouts() {
		if seen[l.kind] {
			t.Errorf("number %d is used twice", l.kind)
		}
		seen[l.kind] = true
	}
}
