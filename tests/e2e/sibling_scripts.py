"""What siblings do with their disk while a test looks on."""

TREE_SCRIPT = """
set -e
mke2fs /dev/vda >/dev/null
mount -t ext4 /dev/vda /mnt
cp -r /modules /etc /init /mnt
for i in $(seq 100); do echo "file $i" >/mnt/$i; done
sync
diff -r /modules /mnt/modules
echo "tree $(cd /mnt && find modules init -type f | sort | xargs sha256sum | sha256sum)"
umount /mnt
echo "disk $(sha256sum </dev/vda)"
"""

#: Writes whole MiBs with their number in every byte, each flushed, and tells after each; then reads all of it.
COUNT_SCRIPT = """
for i in $(seq 30); do
    tr '\\0' "\\\\$(printf %03o $i)" </dev/zero | head -c 1048576 >/tmp/data
    dd if=/tmp/data of=/dev/vda bs=1M seek=$i oflag=direct conv=notrunc,fsync 2>/dev/null || exit 9
    echo "flushed $i"
done
for i in $(seq 30); do
    tr '\\0' "\\\\$(printf %03o $i)" </dev/zero | head -c 1048576 >/tmp/data
    dd if=/dev/vda bs=1M skip=$i count=1 iflag=direct 2>/dev/null | cmp - /tmp/data || exit 10
done
"""
